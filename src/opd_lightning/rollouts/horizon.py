"""Horizons: only the first h tokens of a response are generated and trained on.

On-policy distillation needs no final answer, and late tokens are the dearest. What is cut off is not generated at all;
nothing is added in its place, so an answer that is cut has no closing token among its targets.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from typing_extensions import override

from opd_lightning.interfaces import Sampling, StepFacts
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.rollouts.fact_means import mean_over_processes


class Horizon(ABC):
    """How many response tokens a step generates; `data.sampling.max_new_tokens` is the most.

    Attributes:
        reads: Names of the facts that `observe` reads (docs/metrics.md); a run that cannot know them is refused.
    """

    reads: tuple[str, ...] = ()

    @abstractmethod
    def num_tokens(self, step: int) -> int:
        """Most response tokens in this step, counted from 0; the same on all processes."""

    def observe(self, facts: StepFacts) -> None:  # noqa: B027 - most do not learn
        """A step has been trained: learn from it."""

    def state_dict(self) -> dict[str, Any]:
        """Every value that a later `num_tokens` reads beside the settings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """Restore `state_dict`; an empty one starts over."""


class ConstantHorizon(Horizon):
    """Always the same (TOPD and ESR, docs/reuse.md).

    Args:
        tokens: Response tokens.

    Raises:
        ValueError: Below 1.
    """

    def __init__(self, tokens: int = 64) -> None:
        check_at_least(1, "data.horizon", tokens=tokens)
        self.tokens = tokens

    @override
    def num_tokens(self, step: int) -> int:
        return self.tokens


class GrowingHorizon(Horizon):
    """Grows with the steps: linearly (POPD and Fast OPD, docs/reuse.md) or by doubling.

    Args:
        start: Response tokens of the first step.
        every: Steps after which it grows.
        add: Tokens by which it does; null doubles it.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, start: int = 64, every: int = 10, add: int | None = None) -> None:
        check_at_least(1, "data.horizon", start=start, every=every, add=add)
        self.start, self.every, self.add = start, every, add

    @override
    def num_tokens(self, step: int) -> int:
        times = step // self.every
        if self.add is not None:
            return self.start + self.add * times
        return self.start << min(times, 40)  # beyond any response


class AdaptiveHorizon(Horizon):
    """Doubles when the student has come close to the teacher in the last quarter of the horizon; never shrinks.

    Compared is the mean reverse KL of these tokens in one step (where the teacher does not give its whole vocabulary,
    its estimate from the sampled tokens). Rollouts that do not reach the last quarter say nothing.

    Args:
        start: Response tokens of the first step.
        close: Nats per token at which it doubles.

    Raises:
        ValueError: A number is out of range.
    """

    reads = ("sampled_log_ratio",)

    def __init__(self, start: int = 64, close: float = 0.1) -> None:
        check_at_least(1, "data.horizon", start=start)
        if not close > 0:
            raise ValueError(f"data.horizon.close: expected a positive number of nats per token, got {close}.")
        self.start, self.close = start, close
        self._tokens = start

    @override
    def num_tokens(self, step: int) -> int:
        return self._tokens

    @override
    def observe(self, facts: StepFacts) -> None:
        known = facts.rollouts[0].facts if facts.rollouts else {}
        name = "reverse_kl" if "reverse_kl" in known else "sampled_log_ratio"
        if mean_over_processes(facts, name, first=self._tokens * 3 // 4) <= self.close:
            self._tokens *= 2

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tokens = state.get("tokens", self.start)


class StepSampling:
    """How each step samples: as the run does, up to the horizon.

    A step's horizon is settled when it is first asked for, which is before the step ahead of it has been trained, as
    its rollouts may be begun then; and it stays so through a checkpoint. Once shortened, no later step is longer than
    that, whatever the horizon says.

    Args:
        sampling: Of the run.
        horizon: None for whole answers.
    """

    def __init__(self, sampling: Sampling, horizon: Horizon | None) -> None:
        self.sampling = sampling
        self.horizon = horizon
        self._settled: dict[int, int] = {}
        self._most = sampling.max_new_tokens

    def of_step(self, step: int) -> Sampling:
        """How this step samples."""
        if self.horizon is None:
            return self.sampling
        self._settled = {other: tokens for other, tokens in self._settled.items() if other >= step - 1}
        tokens = self._settled.setdefault(step, min(self.horizon.num_tokens(step), self._most))
        return replace(self.sampling, max_new_tokens=tokens)

    def shorten(self) -> tuple[int, int]:
        """Halve the tokens of every step that is not settled yet; returns those of the last settled step, and the half.

        Called between steps, on every process alike, and with a horizon only.
        """
        before = min(self._settled[max(self._settled)], self._most)
        self._most = max(1, before // 2)
        return before, self._most

    def observe(self, facts: StepFacts) -> None:
        """A step has been trained."""
        if self.horizon is not None:
            self.horizon.observe(facts)

    def state_dict(self) -> dict[str, Any]:
        """What the horizon has learned, and what is settled."""
        if self.horizon is None:
            return {}
        return {"horizon": self.horizon.state_dict(), "settled": dict(self._settled), "most": self._most}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; an empty one starts over."""
        self._settled = dict(state.get("settled", {}))
        self._most = min(state.get("most", sys.maxsize), self.sampling.max_new_tokens)
        if self.horizon is not None:
            self.horizon.load_state_dict(state.get("horizon", {}))
