"""How the gradient of a divergence over candidate tokens is formed: directly, or as a score function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.objectives.arguments import check_advantage_clip, check_one_of
from opd_lightning.objectives.candidate_weights import Weighting, WeightScale, candidate_weights
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.logprobs import clip_reward, close_slots
from opd_lightning.objectives.supports import SampledToken, Support


class Estimator(ABC):
    """Turns aligned log-probabilities on a support into losses.

    Attributes:
        value_is_divergence: Whether the losses are the divergence itself.
    """

    value_is_divergence: bool = False

    @abstractmethod
    def check(self, support: Support) -> None:
        """Refuse supports on which this estimator has no usable gradient.

        Raises:
            ValueError: It is one of them; the message says why, and what to use.
        """

    @abstractmethod
    def losses(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor | None, divergence: Divergence
    ) -> Tensor:
        """Losses [n].

        Args:
            student_log_probs: [n, K] log p with gradient, normalised as the support says.
            teacher_log_probs: [n, K] log q.
            mask: bool [n, K], True where a slot counts; None when all do.
            divergence: What is measured.
        """


@dataclass(frozen=True)
class Direct(Estimator):
    """Differentiates the divergence on the support; its value is the divergence there."""

    value_is_divergence = True

    @override
    def check(self, support: Support) -> None:
        if support.normalization == "none" and not support.is_whole:
            raise ValueError(
                "support.normalization: differentiating the un-normalised divergence on"
                f" {type(support).__name__} moves the student even where it equals the teacher (arXiv 2605.11182). Use"
                " 'renormalize' or 'tail', or estimator: CandidateScore."
            )

    @override
    def losses(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor | None, divergence: Divergence
    ) -> Tensor:
        value = divergence.value(student_log_probs, teacher_log_probs, mask)
        # Where both agree to the last bit there is nothing to learn, but probabilities do not sum to 1 to the last bit,
        # and an optimiser that normalises its steps (Adam) would make whole steps of the gradient of that rounding.
        agrees = close_slots(student_log_probs.detach(), mask) == close_slots(teacher_log_probs, mask)
        return torch.where(agrees.all(-1), value.detach(), value)


@dataclass(frozen=True)
class CandidateScore(Estimator):
    """Score-function losses over candidates: -sum_v w(v) sg[A(v)] log p(v), A the divergence's reward.

    The expectation over tokens is taken analytically under the current student, so no importance ratio is involved.
    Values are surrogates: only their gradient means something.

    Without normalisation, uncentred normalised weights by student probability give the gradient of the renormalised
    reverse KL plus K_S grad log P_S (P_S: the student's mass on the support, K_S: the weighted mean of log p/q), which
    moves mass out of the support wherever K_S > 0 (arXiv 2604.13016, its authors' code); `centered` removes exactly
    that term.

    Args:
        weighting: What w is.
        scale: Whether w sums to 1 at each position ("normalized") or is left as it is ("raw").
        centered: Subtract the w-mean of the advantages of each position.
        advantage_clip: Bound on the absolute reward, before centring; null leaves it free.

    Raises:
        ValueError: A setting is outside its range.
    """

    weighting: Weighting = "student_probability"
    scale: WeightScale = "normalized"
    centered: bool = False
    advantage_clip: float | None = None

    def __post_init__(self) -> None:
        check_one_of("estimator.weighting", self.weighting, get_args(Weighting))
        check_one_of("estimator.scale", self.scale, get_args(WeightScale))
        check_advantage_clip("estimator", self.advantage_clip)

    @override
    def check(self, support: Support) -> None:
        if isinstance(support, SampledToken):
            raise ValueError(
                "objective.estimator: CandidateScore weights candidates, but the sampled token is one, which the"
                " sampling already weights. Use SampledTokenObjective, or another support."
            )
        if support.is_single and support.normalization == "none" and self.centered:
            raise ValueError(
                f"estimator.centered: {type(support).__name__} with k=1 compares one token, whose centred advantage is"
                " always 0. Use k of at least 2, normalization: tail, or centered: false."
            )

    @override
    def losses(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor | None, divergence: Divergence
    ) -> Tensor:
        weights = candidate_weights(student_log_probs, teacher_log_probs, mask, self.weighting, self.scale)
        with torch.no_grad():
            student = close_slots(student_log_probs.detach(), mask)
            teacher = close_slots(teacher_log_probs, mask)
            advantages = clip_reward(divergence.reward(student, teacher), self.advantage_clip)
            if self.centered:  # after clipping: a weighted mean of exactly 0
                total = weights.sum(-1, keepdim=True)
                mean = (weights * advantages).sum(-1, keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny)
                advantages = advantages - mean
            coefficients = -weights * advantages
        return (coefficients * close_slots(student_log_probs, mask)).sum(-1)
