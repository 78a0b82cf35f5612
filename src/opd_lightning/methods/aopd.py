"""AOPD: where the student goes wrong, say what is right (arXiv 2605.06387)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives import (
    DivergenceObjective,
    ForwardKL,
    Importance,
    SampledTokenObjective,
    StudentScores,
    Support,
    TeacherTopK,
    Truncated,
)
from opd_lightning.objectives.logprobs import close_slots


class ForwardKLWhereNegative(SampledTokenObjective):
    """The policy gradient at sampled tokens with an advantage of at least 0; a forward KL in place of it at all others.

    A negative advantage says of one token that it was wrong, and nothing about what is right; the teacher's likeliest
    tokens do.

    Args:
        support: Tokens over which the forward KL goes. Both models are normalised there, so that it is 0 at p = q;
            which normalisation the paper takes is not known.
        importance: Correction for tokens drawn with older weights or by another engine; null for none.
        settings: Of `SampledTokenObjective`.

    Raises:
        ValueError: A setting is outside its range.

    Source: arXiv 2605.06387, known to us from a note only.
    """

    def __init__(
        self,
        support: Support = TeacherTopK(),  # noqa: B008 - it has no state, and --print_config shows it
        importance: Importance | None = Truncated(),  # noqa: B008
        **settings: Any,
    ) -> None:
        super().__init__(importance=importance, **settings)
        self.support = support
        self.covering = DivergenceObjective(
            support,
            ForwardKL(),
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )

    @override
    def request(self) -> ScoreRequest:
        needed, other = super().request(), self.covering.request()
        return replace(
            needed,
            top_k=max(needed.top_k, other.top_k),
            arbitrary_ids=needed.arbitrary_ids or other.arbitrary_ids,
            full_vocabulary=needed.full_vocabulary or other.full_vocabulary,
        )

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        log_probs = close_slots(student.at(tokens.ids[:, None]).squeeze(-1))
        advantages = self._advantages(log_probs.detach(), student, teacher, tokens)
        pushed = self.surrogate(advantages, log_probs, tokens)
        return torch.where(advantages < 0, self.covering.losses_from(student, teacher, tokens), pushed)
