"""The divergence objective: support x divergence x estimator, joined into one loss per token."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, Sampling, ScoreRequest, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives.arguments import check_factor, check_temperatures, check_whole_distribution
from opd_lightning.objectives.divergences import Divergence, ReverseKL
from opd_lightning.objectives.estimators import Direct, Estimator
from opd_lightning.objectives.normalization import (
    log_mass_outside,
    normalize,
    settle_unknown_tails,
    with_tail_slot,
)
from opd_lightning.objectives.student_scores import ScoreObjective, StudentScores
from opd_lightning.objectives.supports import Candidates, FullVocabulary, Support


class DivergenceObjective(ScoreObjective):
    """Pulls the student towards the teacher at every response token by a divergence over candidate tokens.

    The default is the full-vocabulary reverse KL, differentiated directly: its gradient is that of the stated quantity,
    exactly, without a k to choose, without sampling noise, and without probability mass leaking to tokens that nobody
    compares. Where a teacher cannot give its whole vocabulary, the other supports ask for less.

    Prefixes count as given: nothing is propagated through the sampling of earlier tokens (discount 0). Loss and
    gradient are 0 where student and teacher agree, for every combination that is accepted; where a position has no
    candidate (an empty intersection) both are exactly 0.

    Examples:
        >>> from opd_lightning.objectives import CandidateScore, DivergenceObjective, StudentTopK

        Full-vocabulary reverse KL, the default:

        >>> objective = DivergenceObjective()

        The default of arXiv 2604.13016 (Eq. 5), the renormalised reverse KL on the student's top 16:

        >>> objective = DivergenceObjective(StudentTopK(16))

        The variant in its authors' code, with the mass-moving term (see `CandidateScore`):

        >>> objective = DivergenceObjective(StudentTopK(16, normalization="none"), estimator=CandidateScore())

    Args:
        support: Tokens compared at each position, and how both models are normalised on them.
        divergence: What is measured between the two.
        estimator: How its gradient is formed.
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        teacher_temperature: Divides the teacher's logits.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution at
            `student_temperature`.
        chunk_tokens: Response tokens whose logits exist at once, at 8 bytes per vocabulary entry of each.

    Raises:
        ValueError: A setting is outside its range, or support and estimator contradict each other; the message says
            why.
    """

    def __init__(
        self,
        support: Support = FullVocabulary(),  # noqa: B008 - it has no state, and --print_config shows it
        divergence: Divergence = ReverseKL(),  # noqa: B008
        estimator: Estimator = Direct(),  # noqa: B008
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
    ) -> None:
        check_factor("support", support, Support)
        check_factor("divergence", divergence, Divergence)
        check_factor("estimator", estimator, Estimator)
        check_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        check_at_least(1, "objective", chunk_tokens=chunk_tokens)
        estimator.check(support)
        self.support = support
        self.divergence = divergence
        self.estimator = estimator
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.allow_biased_sampling = allow_biased_sampling
        self.chunk_tokens = chunk_tokens
        self.value_is_divergence = estimator.value_is_divergence

    @override
    def request(self) -> ScoreRequest:
        return self.support.request(self.teacher_temperature)

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        check_whole_distribution(sampling, self.student_temperature, self.allow_biased_sampling)

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        with torch.no_grad():
            candidates = self.support.select(student.tempered(), teacher, tokens.ids)
        mask, normalization = candidates.mask, self.support.normalization
        if normalization == "tail":
            scores, log_probs = self._with_tails(student, teacher, candidates)
            return self.estimator.losses(log_probs, scores, with_tail_slot(mask), self.divergence)
        log_probs = student.full() if candidates.ids is None else student.at(candidates.ids)
        scores = candidates.teacher_log_probs.to(log_probs)
        log_probs, scores = normalize(log_probs, mask, normalization), normalize(scores, mask, normalization)
        return self.estimator.losses(log_probs, scores, mask, self.divergence)

    def _with_tails(
        self, student: StudentScores, teacher: TeacherScores, candidates: Candidates
    ) -> tuple[Tensor, Tensor]:
        """Teacher and student with the tail bucket, whose mass is summed over its tokens where they are at hand."""
        ids, mask = candidates.ids, candidates.mask
        assert ids is not None, "the whole vocabulary has no tail"
        tail = student.log_mass_outside(ids, mask)
        log_probs = normalize(student.at(ids), mask, "tail", tail)
        scores = candidates.teacher_log_probs.to(log_probs)
        if not teacher.knows_full:
            return settle_unknown_tails(normalize(scores, mask, "tail"), log_probs), log_probs
        with torch.no_grad():
            teacher_tail = log_mass_outside(teacher.full().to(log_probs), ids, mask)
        return normalize(scores, mask, "tail", teacher_tail), log_probs
