"""`Reuse`: a round of rollouts is generated at once and trained on in many steps, several times over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from typing_extensions import override

from opd_lightning.distributed import gather_objects, world_size
from opd_lightning.interfaces import PromptBatch, Rollout, RolloutBatch, RoundPart, Sampling, StepFacts
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.fact_means import mean_over_processes
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.prompt_stream import join_shares
from opd_lightning.rollouts.records import from_groups, to_groups

NO_SECONDS = {
    "sync": 0.0,
    "generate": 0.0,
    "grade": 0.0,
}  # said, or loggers would repeat those of the round's first step


@dataclass(frozen=True)
class _Round:
    """What one generation gave, and how much of it has been trained.

    Attributes:
        index: Rounds before it.
        first_step: Step of the prompt stream in which it was generated.
        mini_batches: Parts that one pass trains.
        num_passes: Passes planned.
        num_trained: Mini-batches trained so far.
        cut_short: Whether it ends here, before its last pass is over.
        batch: This process's rollouts, graded; without any once the round is over.
        positions: Position of each of this process's prompts in the round.
    """

    index: int
    first_step: int
    mini_batches: int
    num_passes: int
    batch: RolloutBatch
    positions: tuple[int, ...]
    num_trained: int = 0
    cut_short: bool = False

    @property
    def is_over(self) -> bool:
        return self.cut_short or self.num_trained >= self.num_passes * self.mini_batches


class Reuse(OnPolicy):
    """Generates `mini_batches` x `data.prompts_per_step` prompts at once and trains on them `passes` times.

    A step stays one mini-batch of `data.prompts_per_step` prompts and one optimiser step. A round's rollouts come from
    the weights at its start: its first step is on-policy, the others are stale by the steps trained since, which is
    logged (`train/staleness`, and `train/rollout_kl` for the distance). The first pass takes the prompts as they were
    chosen; every further one shuffles them anew: the n-th prompt of a mini-batch is the n-th of some mini-batch of the
    first pass, so that a rollout stays on the process that generated it. Orders are functions of (seed, round, pass).

    The round's rollouts are in every checkpoint: a run killed in the middle of a round goes on as if it had not been.
    What may go wrong when rollouts are used often, and what it costs, is in docs/reuse.md.

    Args:
        mini_batches: Optimiser steps of one pass.
        passes: How often each rollout is trained on; "adaptive" begins with 1, doubles after a round that went well
            and halves after one that was cut short by `max_kl` or from which a search went back.
        max_passes: Most passes of "adaptive".
        max_kl: End the round after a mini-batch whose rollouts have a mean `rollout_kl`, the estimate of
            KL(weights that generated || weights now) in nats per token, above this; null never does.
        max_score_gb: Most gigabytes of teacher scores that a process keeps between passes (in CPU memory); where a
            round needs more, the teacher is asked again in every pass.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        mini_batches: int = 8,
        passes: int | Literal["adaptive"] = 4,
        max_passes: int = 16,
        max_kl: float | None = None,
        max_score_gb: float = 8.0,
    ) -> None:
        check_at_least(1, "data.source", mini_batches=mini_batches, max_passes=max_passes)
        if passes != "adaptive":
            check_at_least(1, "data.source", passes=passes)
        if max_kl is not None and not 0 < max_kl < math.inf:
            raise ValueError(
                f"data.source.max_kl: expected a positive number of nats per token, or null, got {max_kl}."
            )
        if not 0 <= max_score_gb < math.inf:
            raise ValueError(
                f"data.source.max_score_gb: expected a number of gigabytes of at least 0 (0 keeps no scores), got"
                f" {max_score_gb}."
            )
        self.mini_batches = mini_batches
        self.passes = passes
        self.max_passes = max_passes
        self.max_kl = max_kl
        self.max_score_gb = max_score_gb
        self._history = _History()
        self._round: _Round | None = None  # as it was after the last step that was trained
        self._begun: _Round | None = None  # generated for the step under way
        self._saved: Mapping[str, Any] | None = None  # a round whose rollouts are still plain values

    @property
    @override
    def staleness(self) -> int:
        return self.mini_batches * (self.max_passes if self.passes == "adaptive" else self.passes) - 1

    @property
    @override
    def num_steps_wanted(self) -> int:
        if self._saved is not None or (self._round is not None and not self._round.is_over):
            return 0
        return self.mini_batches

    @override
    def share(self, asked: PromptBatch, graded: RolloutBatch | None, seed: int) -> RolloutBatch:
        if graded is not None:
            current = self._begun = _Round(
                self._history.num_rounds,
                asked.step,
                self.mini_batches,
                self._history.next_passes(self.passes, self.max_passes),
                graded,
                tuple(asked.positions),
            )
        else:
            if self._saved is not None:
                self._round, self._saved = _restore(self._saved, asked), None
            assert self._round is not None
            current, self._begun = self._round, None
        return self._hand_out(current, asked.step, seed)

    @override
    def observe(self, facts: StepFacts) -> None:
        current = self._begun if self._begun is not None else self._round
        assert current is not None, "a step was trained that nobody handed out"
        trained = replace(current, num_trained=current.num_trained + 1)
        if self.max_kl is not None:
            trained = replace(trained, cut_short=mean_over_processes(facts, "rollout_kl") > self.max_kl)
        if trained.is_over:
            self._history = _History(trained.index + 1, trained.num_passes, trained.cut_short)
            trained = _over(trained)
        self._round, self._begun = trained, None

    @override
    def observe_search(self, factor: float) -> None:
        """A search that went back ends the round under way, or says that the one just ended was too long."""
        if factor < 0 and self._round is not None:
            self._history = _History(self._round.index + 1, self._round.num_passes, went_too_far=True)
            self._round = _over(replace(self._round, cut_short=True))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The counters, and the rollouts of all processes of a round that is not over."""
        state: dict[str, Any] = {"history": asdict(self._history)}
        if self._saved is not None:  # a resumed run stops before its first step
            return state | {"round": dict(self._saved)}
        if self._round is None or self._round.is_over:
            return state
        batch = self._round.batch
        groups = to_groups(batch.rollouts, self._group_sizes(self._round))
        state["round"] = {
            "index": self._round.index,
            "first_step": self._round.first_step,
            "mini_batches": self._round.mini_batches,
            "num_passes": self._round.num_passes,
            "num_trained": self._round.num_trained,
            "weight_version": batch.weight_version,
            "sampling": asdict(batch.sampling),
            "groups": join_shares(gather_objects(groups)),
        }
        return state

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._round = self._begun = None
        self._saved = state.get("round")
        self._history = _History(**state.get("history", {}))

    def _hand_out(self, current: _Round, step: int, seed: int) -> RolloutBatch:
        """The mini-batch that comes next."""
        pass_index, part = divmod(current.num_trained, current.mini_batches)
        size = len(current.positions) * world_size() // current.mini_batches
        order = shuffled(current.mini_batches, size, None if pass_index == 0 else (seed, current.index, pass_index))
        groups = self._by_position(current)
        rollouts = [rollout for position in order[part] for rollout in groups.get(position, ())]
        return replace(
            current.batch,
            rollouts=rollouts,
            step=step,
            seconds=current.batch.seconds if step == current.first_step else dict(NO_SECONDS),
            staleness=step - current.first_step,
            round=RoundPart(
                current.index,
                pass_index,
                current.num_passes,
                tuple(current.batch.rollouts),
                int(self.max_score_gb * 1e9),
            ),
        )

    def _by_position(self, current: _Round) -> dict[int, list[Rollout]]:
        """This process's rollouts, those of a prompt together, by the prompt's position in the round."""
        rollouts, size = current.batch.rollouts, self._group_sizes(current)[0]
        return {position: rollouts[i * size : (i + 1) * size] for i, position in enumerate(current.positions)}

    @staticmethod
    def _group_sizes(current: _Round) -> list[int]:
        return [len(current.batch.rollouts) // len(current.positions)] * len(current.positions)


@dataclass(frozen=True)
class _History:
    """What the next round's number of passes depends on.

    Attributes:
        num_rounds: Rounds that are over.
        num_passes: Passes planned for the last of them; 0 before the first.
        went_too_far: Whether it was cut short, or a search at its end went back.
    """

    num_rounds: int = 0
    num_passes: int = 0
    went_too_far: bool = False

    def next_passes(self, passes: int | Literal["adaptive"], most: int) -> int:
        if passes != "adaptive":
            return passes
        if self.num_passes == 0:
            return 1
        return max(1, self.num_passes // 2) if self.went_too_far else min(most, self.num_passes * 2)


def shuffled(mini_batches: int, size: int, seed_parts: Sequence[int] | None) -> list[list[int]]:
    """Positions in the round, one list for each mini-batch of a pass.

    Each of the `size` places of a mini-batch is shuffled on its own over the mini-batches, so that a position keeps its
    remainder, and with it its process.

    Args:
        mini_batches: Mini-batches of a pass.
        size: Prompts of each, over all processes.
        seed_parts: What the order depends on; None leaves the positions in order.
    """
    positions = torch.arange(mini_batches * size).view(mini_batches, size)
    if seed_parts is not None:
        generator = torch.Generator().manual_seed(derive_seed("reuse", *seed_parts))
        order = torch.rand(mini_batches, size, generator=generator, dtype=torch.float64).argsort(dim=0)
        positions = positions.gather(0, order)
    batches: list[list[int]] = positions.tolist()
    return batches


def _over(ended: _Round) -> _Round:
    """Without its rollouts, which nobody needs any more."""
    return replace(ended, batch=replace(ended.batch, rollouts=[]))


def _restore(state: Mapping[str, Any], asked: PromptBatch) -> _Round:
    """The round under way, as it was when the checkpoint was written."""
    rollouts = from_groups(state["groups"], asked.positions, asked.problems)
    batch = RolloutBatch(rollouts, state["weight_version"], state["first_step"], Sampling(**state["sampling"]))
    return _Round(
        state["index"],
        state["first_step"],
        state["mini_batches"],
        state["num_passes"],
        batch,
        tuple(asked.positions),
        state["num_trained"],
    )
