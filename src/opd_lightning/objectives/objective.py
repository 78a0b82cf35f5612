"""The objective: support x normalisation x divergence x estimator x weighting, joined into one loss per token."""

from __future__ import annotations

import warnings

from torch import Tensor

from opd_lightning.interfaces import Sampling, ScoreRequest, TeacherScores
from opd_lightning.objectives.candidate_weights import Weighting, WeightScale, candidate_weights
from opd_lightning.objectives.divergences import Divergence, ReverseKL
from opd_lightning.objectives.estimators import candidate_losses, sampled_token_losses
from opd_lightning.objectives.logprobs import full_log_probs, log_probs_at
from opd_lightning.objectives.supports import (
    Normalization,
    Support,
    normalize,
    request_scores,
    select_candidates,
    with_tail_slot,
)
from opd_lightning.objectives.validity import (
    DEFAULT_CLIP,
    DEFAULT_IMPORTANCE_CAP,
    DEFAULT_K,
    Estimator,
    Importance,
    check_objective,
)


class Objective:
    """Pulls the student towards the teacher at every response token; one loss per token, in nats.

    The default is the full-vocabulary reverse KL, differentiated directly: its gradient is that of the stated quantity,
    exactly, without a k to choose, without sampling noise, and without probability mass leaking to tokens that nobody
    compares. Where a teacher cannot give its whole vocabulary, the other supports ask for less.

    Prefixes count as given: nothing is propagated through the sampling of earlier tokens (discount 0). Loss and
    gradient are 0 where student and teacher agree, for every combination that is accepted; where a position has no
    candidate (an empty intersection) both are exactly 0. Values of the estimator "score_function" are surrogates: only
    their gradient means something.

    Top-k supports, renormalised, say nothing about the student's mass outside them: watch the statistic
    `student_top_mass`, or use "tail". Without normalisation, uncentred normalised weights by student probability give
    the gradient of the renormalised reverse KL plus K_S grad log P_S (P_S: the student's mass on the support, K_S: the
    weighted mean of log p/q), which moves mass out of the support wherever K_S > 0; `centered`
    removes exactly that term.

    Examples:
        Full-vocabulary reverse KL, the default:

        >>> objective = Objective()

        The default of arXiv 2604.13016 (Eq. 5), the renormalised reverse KL on the student's top 16:

        >>> objective = Objective(support="student_top_k", k=16)

        The variant in its authors' code, with the mass-moving term:

        >>> objective = Objective(
        ...     support="student_top_k",
        ...     k=16,
        ...     normalization="none",
        ...     estimator="score_function",
        ...     weighting="student_probability",
        ...     weight_scale="normalized",
        ...     centered=False,
        ... )

        A policy gradient on the sampled token, with a truncated importance ratio:

        >>> objective = Objective(support="sampled_token", estimator="score_function")

    Args:
        support: Tokens compared at each position.
        k: Size of the student's and of the teacher's top-k list; clipped to the vocabulary.
        normalization: On the support: "renormalize" both models, append a "tail" bucket with the remaining mass of
            each, or "none". null means "renormalize" for top-k supports and "none" for the others.
        divergence: What is measured between the two.
        estimator: "direct" differentiates the divergence on the support; "score_function" takes the divergence's reward
            as a detached advantage A, -sum_v w(v) A(v) log p(v).
        weighting: w of the score function on candidates; null means "student_probability".
        weight_scale: Whether w sums to 1 at each position ("normalized") or is left as it is ("raw"); null means
            "normalized".
        centered: Subtract the w-mean of the advantages of each position.
        importance: Correction of the sampled token's score function for tokens drawn with older weights or by another
            engine: a "truncated" ratio, a "masked" one (tokens too far off are left out), the "ppo" clipped surrogate
            (for more than one update per rollout batch), or "none". null means "truncated" there. Candidate supports
            take the expectation analytically and need none.
        importance_cap: Largest ratio of "truncated"; "masked" also leaves out what is below its inverse.
        clip_low: How far below 1 the ratio of "ppo" may go.
        clip_high: How far above 1 the ratio of "ppo" may go.
        advantage_clip: Bound on the absolute reward, before centring; null leaves it free.
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        teacher_temperature: Divides the teacher's logits.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution at
            `student_temperature`.
        chunk_tokens: Response tokens whose logits exist at once, at some 20 to 50 bytes per vocabulary entry of each.

    Raises:
        ValueError: A setting is outside its range, or settings contradict each other; the message says why.
    """

    def __init__(
        self,
        support: Support = "full_vocabulary",
        k: int = DEFAULT_K,
        normalization: Normalization | None = None,
        divergence: Divergence = ReverseKL(),  # noqa: B008 - it has no state, and --print_config shows it
        estimator: Estimator = "direct",
        weighting: Weighting | None = None,
        weight_scale: WeightScale | None = None,
        centered: bool = False,
        importance: Importance | None = None,
        importance_cap: float = DEFAULT_IMPORTANCE_CAP,
        clip_low: float = DEFAULT_CLIP,
        clip_high: float = DEFAULT_CLIP,
        advantage_clip: float | None = None,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
    ) -> None:
        self.support: Support = support
        self.k = k
        whole = support in ("sampled_token", "full_vocabulary")
        self.normalization: Normalization = normalization or ("none" if whole else "renormalize")
        self.divergence = divergence
        self.estimator: Estimator = estimator
        self.weighting: Weighting | None = weighting
        self.weight_scale: WeightScale | None = weight_scale
        self.centered = centered
        self.importance: Importance | None = importance
        self.importance_cap = importance_cap
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.advantage_clip = advantage_clip
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.allow_biased_sampling = allow_biased_sampling
        self.chunk_tokens = chunk_tokens
        self._has_warned = False
        check_objective(self)

    @property
    def effective_importance(self) -> Importance:
        """The importance correction in use: null resolved."""
        if self.importance is not None:
            return self.importance
        return "truncated" if self._uses_sampled_score else "none"

    @property
    def _uses_sampled_score(self) -> bool:
        return self.support == "sampled_token" and self.estimator == "score_function"

    def request(self) -> ScoreRequest:
        """What the losses ask of the teacher."""
        return request_scores(self.support, self.k, self.teacher_temperature)

    def check_sampling(self, sampling: Sampling) -> None:
        """Make sure that rollouts come from the distribution that the losses take expectations under.

        Another temperature, or a top-p or top-k cut, visits other states and weights tokens differently, so the
        gradient is no longer that of the stated divergence.

        Args:
            sampling: How training rollouts will be drawn.

        Raises:
            ValueError: They differ and `allow_biased_sampling` is off; when it is on, warns once.
        """
        reasons = []
        if sampling.temperature != self.student_temperature:
            reasons.append(
                f"sampling.temperature is {sampling.temperature} but objective.student_temperature is "
                f"{self.student_temperature}; set both to the same value"
            )
        if sampling.top_p < 1 or sampling.top_k > 0:
            reasons.append(
                f"sampling.top_p={sampling.top_p} and sampling.top_k={sampling.top_k} cut tokens off; set top_p to 1 "
                "and top_k to 0"
            )
        if not reasons:
            return
        message = f"The rollouts would not follow the student's distribution: {'; '.join(reasons)}."
        if not self.allow_biased_sampling:
            raise ValueError(f"{message} Or accept the bias with objective.allow_biased_sampling=true.")
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{message} Accepted because objective.allow_biased_sampling is true.", stacklevel=2)

    def token_losses(
        self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor, rollout_log_probs: Tensor
    ) -> Tensor:
        """Losses [n] of n response tokens, in nats, differentiable in the student's logits.

        Args:
            student_logits: [n, V] untempered; half precision is upcast to float32.
            teacher: Scores of the same n tokens at `teacher_temperature`, as `request` asks for.
            response_ids: int64 [n], the sampled tokens.
            rollout_log_probs: [n] their log-probabilities when they were drawn, at the sampling temperature.
        """
        assert student_logits.shape[0] == teacher.num_tokens == response_ids.numel() == rollout_log_probs.numel()
        candidates = select_candidates(self.support, self.k, student_logits, teacher, response_ids)
        if candidates.ids is None:
            student = full_log_probs(student_logits, self.student_temperature)
        else:
            student = log_probs_at(student_logits, candidates.ids, self.student_temperature)
        scores = candidates.teacher_log_probs.detach().to(student)
        if self._uses_sampled_score:
            return sampled_token_losses(
                student.squeeze(-1),
                scores.squeeze(-1),
                rollout_log_probs.to(student),
                self.divergence,
                importance=self.effective_importance,
                importance_cap=self.importance_cap,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                advantage_clip=self.advantage_clip,
            )
        return self._candidate_losses(student, scores, candidates.mask)

    def _candidate_losses(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if self.support != "full_vocabulary":  # which is normalised already
            student = normalize(student, mask, self.normalization)
            teacher = normalize(teacher, mask, self.normalization)
            mask = with_tail_slot(mask) if self.normalization == "tail" else mask
        if self.estimator == "direct":
            return self.divergence.value(student, teacher, mask)
        return candidate_losses(
            student,
            teacher,
            mask,
            candidate_weights(
                student, teacher, mask, self.weighting or "student_probability", self.weight_scale or "normalized"
            ),
            self.divergence,
            centered=self.centered,
            advantage_clip=self.advantage_clip,
        )
