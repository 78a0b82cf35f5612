"""`DifficultyPool`: prompts that the student gets right sometimes, but not always."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.interfaces import Problem, PromptOutcome, PromptSelector
from opd_lightning.randomness import derive_seed
from opd_lightning.selection.passes import Shuffled, check_num_problems


class DifficultyPool(PromptSelector):
    """Draws mostly from the prompts whose pass rate lies strictly between `low` and `high`.

    The pool is made of prompts seen before with such a pass rate (mean reward of their rollouts). A fixed share of
    the draws, and whatever the pool is too small to give, comes from a shuffled stream over all prompts: its first pass
    brings the unseen ones, later passes look again at those that were too easy or too hard. No prompt comes twice in a
    selection unless there are fewer prompts than asked for. Nothing is removed for good, as a prompt that all rollouts
    fail or pass still teaches under a dense loss.

    A prompt's counts shrink by `decay` each time it is seen again, so that the pass rate follows the student (with
    high = 1 a prompt answered wrong once would stay for long). With few rollouts per prompt the rate is coarse; with
    one, a prompt enters the pool only after a right and a wrong answer.

    Args:
        low: Pass rates up to here are too hard.
        high: Pass rates from here on are too easy.
        exploration: Least share of the draws that come from the stream over all prompts.
        decay: Factor on a prompt's old counts when it is seen again; 0 remembers the last rollouts only, 1 everything.

    Raises:
        ValueError: A number is outside [0, 1], or low is not below high.
    """

    needs_rewards = True

    def __init__(self, low: float = 0.05, high: float = 0.95, exploration: float = 0.25, decay: float = 0.5) -> None:
        for name, value in (("low", low), ("high", high), ("exploration", exploration), ("decay", decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"selector.{name}: expected a number from 0 to 1, got {value}.")
        if low >= high:
            raise ValueError(f"selector.low: expected a number below selector.high={high}, got {low}.")
        self.low = low
        self.high = high
        self.exploration = exploration
        self.decay = decay
        self._stream = Shuffled()
        self._position = 0
        self._right = self._seen = torch.zeros(0, dtype=torch.float64)

    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the problems, none of them seen."""
        self._seed, self._position = seed, 0
        self._stream.setup(problems, derive_seed(seed, "exploration"))
        self._right = torch.zeros(len(problems), dtype=torch.float64)
        self._seen = torch.zeros(len(problems), dtype=torch.float64)

    @property
    def epoch_length(self) -> int:
        """Number of problems."""
        return len(self._seen)

    def select(self, num_problems: int) -> list[int]:
        """Indices of the next problems: from the pool first, then from the stream."""
        end = self._position + num_problems
        num_exploring = math.floor(end * self.exploration) - math.floor(self._position * self.exploration)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "pool", self._position))
        pool = self._in_pool().nonzero().flatten()
        order = torch.randperm(len(pool), generator=generator)[: num_problems - num_exploring]
        chosen: list[int] = pool[order].tolist()
        taken = set(chosen)
        while len(chosen) < num_problems:
            if len(taken) == self.epoch_length:
                taken.clear()
            (index,) = self._stream.select(1)
            if index not in taken:
                taken.add(index)
                chosen.append(index)
        self._position = end
        return chosen

    def observe(self, outcomes: Iterable[PromptOutcome]) -> None:
        """Count right answers.

        Raises:
            ValueError: A rollout has no grade.
        """
        for outcome in outcomes:
            if any(math.isnan(reward) for reward in outcome.rewards):
                raise ValueError("selector: DifficultyPool needs graded rollouts, but the task's grade is NaN.")
            self._right[outcome.index] = self.decay * self._right[outcome.index] + sum(outcome.rewards)
            self._seen[outcome.index] = self.decay * self._seen[outcome.index] + len(outcome.rewards)

    def state_dict(self) -> dict[str, Any]:
        """Counts of every problem and how many were drawn."""
        return {
            "num_problems": self.epoch_length,
            "position": self._position,
            "stream": self._stream.state_dict(),
            "right": self._right.clone(),
            "seen": self._seen.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: The state belongs to another number of problems.
        """
        check_num_problems(state, self.epoch_length)
        self._stream.load_state_dict(state["stream"])
        self._position = int(state["position"])
        self._right, self._seen = state["right"].clone(), state["seen"].clone()

    def metrics(self) -> dict[str, float]:
        """Share of the problems in the pool, share never seen, and mean pass rate of the seen."""
        seen = self._seen > 0
        metrics = {
            "pool_share": self._in_pool().double().mean().item(),
            "unseen_share": 1 - seen.double().mean().item(),
        }
        if seen.any():
            metrics["pass_rate"] = self._pass_rates()[seen].mean().item()
        return metrics

    def _pass_rates(self) -> Tensor:
        """[problems] mean reward, NaN for unseen problems."""
        return self._right / self._seen

    def _in_pool(self) -> Tensor:
        rates = self._pass_rates()
        return (rates > self.low) & (rates < self.high)
