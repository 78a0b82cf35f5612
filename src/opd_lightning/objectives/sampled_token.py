"""The policy gradient on the sampled token: what a teacher that scores nothing else is enough for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, ResponseTokens, Rollout, Sampling, ScoreRequest, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives.arguments import (
    check_advantage_clip,
    check_factor,
    check_temperatures,
    check_whole_distribution,
)
from opd_lightning.objectives.divergences import Divergence, ReverseKL
from opd_lightning.objectives.logprobs import clip_reward, close_slots
from opd_lightning.objectives.student_scores import ScoreObjective, StudentLogits, StudentScores

LARGEST_LOG_IMPORTANCE = 20.0
"""Bound on |log p - rollout log-probability| before the exponential."""


class Importance(ABC):
    """Corrects score-function losses for tokens that older weights or another engine drew.

    Without a correction the gradient is biased by the difference between the two.

    Attributes:
        reads_rollout_log_probs: Whether the log-probabilities that the tokens were drawn with must be known.
    """

    reads_rollout_log_probs = True

    @abstractmethod
    def losses(self, advantages: Tensor, log_probs: Tensor, log_ratio: Tensor) -> Tensor:
        """Losses [n] of sampled tokens.

        Args:
            advantages: [n], without gradient.
            log_probs: [n] log p of the sampled tokens, with gradient.
            log_ratio: [n] log p - log p_rollout, bounded by `LARGEST_LOG_IMPORTANCE`, with gradient.
        """


@dataclass(frozen=True)
class Truncated(Importance):
    """Multiply the advantage by min(p / p_rollout, cap): the cap bounds the variance and leaves a small bias.

    Args:
        cap: Largest ratio.

    Raises:
        ValueError: It is below 1, which would shrink on-policy gradients.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.cap < math.inf:
            raise ValueError(
                "importance.cap: expected a finite number of at least 1 (a smaller cap would shrink"
                f" on-policy gradients), got {self.cap}."
            )

    @override
    def losses(self, advantages: Tensor, log_probs: Tensor, log_ratio: Tensor) -> Tensor:
        return -log_ratio.detach().exp().clamp(max=self.cap) * advantages * log_probs


@dataclass(frozen=True)
class Masked(Importance):
    """Weight by the ratio as it is, and leave tokens out whose ratio is above the cap or below its inverse.

    Such a token says more about the difference of the two models than about the teacher.

    Args:
        cap: Largest ratio that is kept.

    Raises:
        ValueError: It is not above 1.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        if not 1 < self.cap < math.inf:
            raise ValueError(
                f"importance.cap: expected a finite number above 1 (at 1 nothing is left), got {self.cap}."
            )

    @override
    def losses(self, advantages: Tensor, log_probs: Tensor, log_ratio: Tensor) -> Tensor:
        kept = log_ratio.detach().abs() <= math.log(self.cap)
        weight = log_ratio.exp().detach() * kept
        return -weight * advantages * log_probs


@dataclass(frozen=True)
class Clipped(Importance):
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), the surrogate of PPO (arXiv 1707.06347, Eq. 7).

    A token gets no gradient once its ratio has left the interval in the direction that A asks for: for more than one
    update per rollout batch.

    Args:
        low: How far below 1 the ratio may go.
        high: How far above 1 the ratio may go.

    Raises:
        ValueError: A number is outside its range.
    """

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.low < 1:
            raise ValueError(f"importance.low: expected a number between 0 and 1, got {self.low}.")
        if not 0 < self.high < math.inf:
            raise ValueError(f"importance.high: expected a finite number above 0, got {self.high}.")

    @override
    def losses(self, advantages: Tensor, log_probs: Tensor, log_ratio: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)


def push(advantages: Tensor, log_probs: Tensor, tokens: ResponseTokens, importance: Importance | None) -> Tensor:
    """Losses [n] that push sampled tokens by their advantages.

    Args:
        advantages: [n], without gradient.
        log_probs: [n] log p of the tokens, with gradient.
        tokens: The n tokens.
        importance: Correction for tokens that others drew; None for none.
    """
    if importance is None:
        return -advantages * log_probs
    log_ratio = log_probs - tokens.rollout_log_probs.to(log_probs)
    return importance.losses(advantages, log_probs, log_ratio.clamp(-LARGEST_LOG_IMPORTANCE, LARGEST_LOG_IMPORTANCE))


class SampledTokenObjective(ScoreObjective):
    """Score-function losses -sg[A] log p(y) of the sampled tokens y, whose expectation is the divergence's gradient.

    A is the divergence's reward (log q - log p for the reverse KL), clipped first, then given to `advantage`. Rewards
    come from the current student's log-probabilities and are detached. Values are surrogates: only their gradient means
    something. Needs the least of a teacher: its log-probability of the sampled token.

    Args:
        divergence: Gives the reward.
        importance: Correction for tokens drawn with older weights or by another engine; null for none.
        advantage: Turns rewards into advantages, for example by subtracting a baseline; null takes them as they are.
        advantage_clip: Bound on the absolute reward; null leaves it free.
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        teacher_temperature: Divides the teacher's logits.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution at
            `student_temperature`.
        chunk_tokens: Response tokens whose logits exist at once.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        divergence: Divergence = ReverseKL(),  # noqa: B008 - it has no state, and --print_config shows it
        importance: Importance | None = Truncated(),
        advantage: Advantage | None = None,
        advantage_clip: float | None = None,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
    ) -> None:
        check_factor("divergence", divergence, Divergence)
        if importance is not None:
            check_factor("importance", importance, Importance)
        if advantage is not None:
            check_factor("advantage", advantage, Advantage)
        check_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        check_at_least(1, "objective", chunk_tokens=chunk_tokens)
        check_advantage_clip("objective", advantage_clip)
        self.divergence = divergence
        self.importance = importance
        self.advantage = advantage
        self.advantage_clip = advantage_clip
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.allow_biased_sampling = allow_biased_sampling
        self.chunk_tokens = chunk_tokens
        self.needs_log_ratios = advantage is not None and advantage.needs_log_ratios
        self.compares_marks = advantage is not None and advantage.compares_marks
        reads_log_probs = importance is not None and importance.reads_rollout_log_probs
        self.needs_rollout_log_probs = reads_log_probs or self.needs_log_ratios

    @override
    def request(self) -> ScoreRequest:
        needed = ScoreRequest(temperature=self.teacher_temperature)
        return needed if self.advantage is None else self.advantage.request(needed)

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        check_whole_distribution(sampling, self.student_temperature, self.allow_biased_sampling)

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        if self.needs_log_ratios and self.advantage_clip is not None:
            groups = [[self._clipped(rollout) for rollout in group] for group in groups]
        return groups if self.advantage is None else self.advantage.shape(groups)

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        log_probs = close_slots(student.at(tokens.ids[:, None]).squeeze(-1))
        return self.surrogate(self._advantages(log_probs.detach(), student, teacher, tokens), log_probs, tokens)

    def surrogate(self, advantages: Tensor, log_probs: Tensor, tokens: ResponseTokens) -> Tensor:
        """Losses [n] that push the sampled tokens with these advantages.

        Args:
            advantages: [n], without gradient.
            log_probs: [n] log p of the sampled tokens, with gradient.
            tokens: The n tokens.
        """
        return push(advantages, log_probs, tokens, self.importance)

    @override
    @torch.no_grad()
    def advantages(self, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens) -> Tensor:
        student = StudentLogits(student_logits, self.student_temperature)
        log_probs = close_slots(student.at(tokens.ids[:, None]).squeeze(-1))
        return self._advantages(log_probs, student, teacher, tokens)

    def _clipped(self, rollout: Rollout) -> Rollout:
        clipped = clip_reward(rollout.extras["log_ratio"], self.advantage_clip)
        return replace(rollout, extras={**rollout.extras, "log_ratio": clipped})

    @torch.no_grad()
    def _advantages(
        self, log_probs: Tensor, student: StudentScores, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        rewards = self.divergence.reward(log_probs, teacher.sampled().to(log_probs))
        advantages = clip_reward(rewards, self.advantage_clip)
        if self.advantage is None:
            return advantages
        return self.advantage(advantages, student.tempered(), teacher, tokens)
