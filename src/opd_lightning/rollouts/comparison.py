"""Student against teacher on rollouts: the training step, EffOPD's scores and diagnoses all look through this.

Knows students, teachers and objectives through their seams; knows no trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Objective, Rollout, ScoreRequest, Student, Teacher, TrainedRollout
from opd_lightning.objectives import compare_in_chunks
from opd_lightning.rollouts.batching import collate, cut_by_tokens

Clock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Comparison:
    """One micro-batch, compared.

    Attributes:
        micro_batch: The N tokens and the rollouts behind them.
        losses: [N] with gradient, nats.
        facts: float32 [N] each, without gradient, by name.
        is_packed: Whether the student left the micro-batch's padding out.
    """

    micro_batch: MicroBatch
    losses: Tensor
    facts: dict[str, Tensor]
    is_packed: bool = False

    def detached(self) -> Comparison:
        """The same without gradient."""
        return replace(self, losses=self.losses.detach())

    def by_rollout(self) -> list[TrainedRollout]:
        """Losses and facts of each rollout, on the CPU."""
        together = torch.stack([self.losses.detach().float(), *self.facts.values()]).cpu()
        names = tuple(self.facts)
        return [
            TrainedRollout(rollout, table[0], _Rows(names, table[1:]))
            for rollout, table in zip(
                self.micro_batch.rollouts, self.micro_batch.by_rollout(together, dim=-1), strict=True
            )
        ]


class _Rows(Mapping[str, Tensor]):
    """Rows of a table by name: a step has thousands, and few are looked at.

    Args:
        names: One for each row.
        table: [k, N].
    """

    def __init__(self, names: tuple[str, ...], table: Tensor) -> None:
        self._names = names
        self._table = table

    @override
    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._table[self._names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @override
    def __len__(self) -> int:
        return len(self._names)


def make_micro_batches(
    rollouts: Sequence[Rollout], *, max_tokens: int, pad_id: int, device: torch.device, at_least: int = 1
) -> list[MicroBatch]:
    """Cut rollouts into micro-batches of at most `max_tokens` padded tokens, longest first, on the device.

    Where there are fewer than `at_least` the largest are halved until there are so many.
    """
    return [collate(group, pad_id).to(device) for group in cut_by_tokens(rollouts, max_tokens, at_least)]


def compare(
    student: Student,
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    teacher: Teacher | None = None,
    request: ScoreRequest | None = None,
    *,
    facts_k: int = 0,
    counts_alike: bool = True,
    clock: Clock = lambda part: nullcontext(),
) -> Iterator[Comparison]:
    """Compare student and teacher on the response tokens of micro-batches, one after the other.

    The teacher sees all of them at once (`Teacher.score_all`); the student goes through the next one when it is asked
    for, so a backward pass in between lets go of the last one's activations.

    Args:
        student: How to run the model.
        model: The loaded student, in the mode and the precision that the caller wants.
        micro_batches: On the model's device.
        objective: Gives the losses.
        teacher: Scores the tokens; None when the objective needs no teacher.
        request: What the teacher is asked; None without one.
        facts_k: Size of the top-k lists of the facts; 0 computes none.
        counts_alike: Whether losses will be summed up as they are (`compare_in_chunks`).
        clock: Measures the parts "teacher" and "student".
    """
    scores = None
    if teacher is not None and request is not None:
        with clock("teacher"):
            scores = iter(teacher.score_all(micro_batches, request))
    for micro_batch in micro_batches:
        with clock("teacher"):
            teacher_scores = next(scores) if scores is not None else None
        with clock("student"):
            results = compare_in_chunks(
                student.hidden_states(model, micro_batch),
                student.head(model),
                objective,
                teacher_scores,
                micro_batch.tokens,
                asked=request,
                facts_k=facts_k,
                counts_alike=counts_alike,
            )
        yield Comparison(micro_batch, results.losses, results.facts, student.packs(model))
