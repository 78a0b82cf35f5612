"""`KeptScores`: a teacher's scores of a round of rollouts, kept on the CPU while the round is used again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import MicroBatch, ScoreRequest, Student, Teacher, TeacherScores


class KeptScores(Teacher):
    """Another teacher, asked once for each rollout of a round.

    Kept is what the scores consist of (`TeacherScores.columns`): hidden states, where the teacher runs in this process,
    so that its head is applied again in each pass; else the lists that it sent. The round is scored as a whole, in
    micro-batches of its own: what is kept does not depend on which mini-batch needs it first, so a resumed run that
    scores the round again gets the same numbers. Scores that cannot be kept are asked for again, which is said once.

    Args:
        teacher: Who scores; it must not change during a round.

    Attributes:
        num_bytes: Bytes held now.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.num_bytes = 0
        self._round: int | None = None
        self._kind: TeacherScores | None = None
        self._columns: dict[int, dict[str, Tensor]] = {}  # by the seed of a rollout
        self._is_filled = False
        self._has_told = False

    def score_round(self, index: int, batches: Sequence[MicroBatch], request: ScoreRequest, max_bytes: int) -> None:
        """Ask for the scores of a round and let go of those of the round before; does nothing for a round it has.

        Args:
            index: Number of the round.
            batches: All its rollouts, in a cut that depends on nothing else.
            request: What will be asked for.
            max_bytes: Most bytes to hold; a round that needs more is not kept.
        """
        if index == self._round:
            return
        self.forget()
        self._round = index
        reasons = gather_objects(self._fill(batches, request, max_bytes))  # who shares a teacher asks as all do
        reason = next((told for told in reasons if told is not None), None)
        self._is_filled = reason is None
        if reason is not None:
            self._give_up(reason)

    def _fill(self, batches: Sequence[MicroBatch], request: ScoreRequest, max_bytes: int) -> str | None:
        """Hold the scores; returns why they cannot be held, or None."""
        num_tokens, num_scored = sum(batch.num_tokens for batch in batches), 0
        for batch, scores in zip(batches, self.teacher.score_all(batches, request), strict=True):
            columns = scores.columns()
            if columns is None:
                return f"model.teacher: the scores of {type(self.teacher).__name__} cannot be kept"
            num_scored += batch.num_tokens
            self.num_bytes += sum(column.nbytes for column in columns.values())
            if num_scored and self.num_bytes / num_scored * num_tokens > max_bytes:
                needed = self.num_bytes / num_scored * num_tokens
                return (
                    f"data.source.max_score_gb={max_bytes / 1e9:g}: a round's teacher scores take about"
                    f" {needed / 1e9:.2g} GB"
                )
            self._kind = self._kind or scores.from_columns({name: rows[:0].clone() for name, rows in columns.items()})
            parts = {name: batch.by_rollout(rows.cpu()) for name, rows in columns.items()}
            for place, rollout in enumerate(batch.rollouts):
                self._columns[rollout.seed] = {name: rows[place] for name, rows in parts.items()}
        return None

    def forget(self) -> None:
        """Let go of what is held."""
        self._round, self._kind, self._columns, self.num_bytes = None, None, {}, 0
        self._is_filled = False

    @property
    @override
    def offer(self) -> ScoreRequest:
        return self.teacher.offer

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        self.teacher.setup(student, model, device)

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        """From what is held, else from the teacher."""
        if self._kind is None:
            return self.teacher.score(batch, request)
        held = [self._columns[rollout.seed] for rollout in batch.rollouts]
        device = batch.input_ids.device
        return self._kind.from_columns(
            {name: torch.cat([columns[name] for columns in held]).to(device) for name in held[0]}
        )

    @override
    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        if not self._is_filled:
            return self.teacher.score_all(batches, request)
        return super().score_all(batches, request)

    def _give_up(self, reason: str) -> None:
        round_index = self._round
        self.forget()
        self._round = round_index
        if not self._has_told:
            warnings.warn(f"{reason}, so the teacher is asked again each time they are needed.", stacklevel=2)
        self._has_told = True
