"""`TwoContexts`: BRTS's loss, of the student's answers and of the teacher's beside them (arXiv 2605.09725)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Objective, ResponseTokens, Sampling, ScoreRequest, TeacherScores
from opd_lightning.objectives import DivergenceObjective, ForwardKL, StudentTopK, TeacherTopK


class TwoContexts(Objective):
    """One loss on the student's own answers, another on those of the teacher beside them (`BestOfTeacher`).

    The loss of a step is the mean of the first over the student's answers, plus `teacher_weight` times the mean of the
    second over the teacher's; both means over all tokens of the step. Where there are none of the teacher, it is the
    first alone.

    Args:
        teacher_weight: Of the second loss. No default: 10 in a note of the paper, 0.05 in the authors' code, where it
            is switched off.
        student_context: Loss on the student's answers; the default is the paper's.
        teacher_context: Loss on the teacher's.

    Raises:
        ValueError: The weight is negative, or the two losses have different temperatures.

    Source: arXiv 2605.09725 and the authors' code.
    """

    def __init__(
        self,
        teacher_weight: float,
        student_context: DivergenceObjective | None = None,
        teacher_context: DivergenceObjective | None = None,
    ) -> None:
        if not 0 <= teacher_weight < math.inf:
            raise ValueError(f"objective.teacher_weight: expected a number of at least 0, got {teacher_weight}.")
        self.teacher_weight = teacher_weight
        self.student_context = student_context or DivergenceObjective(StudentTopK(16))
        self.teacher_context = teacher_context or DivergenceObjective(TeacherTopK(16), ForwardKL())
        for name in ("student_temperature", "teacher_temperature"):
            ours, theirs = (getattr(each, name) for each in (self.student_context, self.teacher_context))
            if ours != theirs:
                raise ValueError(
                    f"objective.teacher_context.{name}: expected that of student_context, {ours}, got {theirs}."
                )
        self.student_temperature = self.student_context.student_temperature
        self.chunk_tokens = self.student_context.chunk_tokens
        both = (self.student_context, self.teacher_context)
        self.needs_rollout_log_probs = any(each.needs_rollout_log_probs for each in both)

    @override
    def request(self) -> ScoreRequest:
        ours, theirs = self.student_context.request(), self.teacher_context.request()
        return ScoreRequest(
            top_k=max(ours.top_k, theirs.top_k),
            arbitrary_ids=ours.arbitrary_ids or theirs.arbitrary_ids,
            full_vocabulary=ours.full_vocabulary or theirs.full_vocabulary,
            temperature=ours.temperature,
        )

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        self.student_context.check_sampling(sampling)

    @override
    def token_losses(self, student_logits: Tensor, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        if "teacher_context" not in tokens.extras:
            return self.student_context.token_losses(student_logits, teacher, tokens)
        is_teachers = tokens.extras["teacher_context"] > 0
        starts = [0, *((is_teachers[1:] != is_teachers[:-1]).nonzero().flatten() + 1).tolist()]
        parts = [student_logits.new_zeros(0)]
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if start == stop:
                continue
            part, is_theirs = slice(start, stop), bool(is_teachers[start])
            inner, weight = (self.teacher_context, self.teacher_weight) if is_theirs else (self.student_context, 1.0)
            losses = inner.token_losses(student_logits[part], teacher.slice(start, stop), tokens[part])
            parts.append(weight * tokens.extras["context_share"][part].to(losses) * losses)
        return torch.cat([each.to(parts[-1]) for each in parts])
