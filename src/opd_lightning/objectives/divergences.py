"""Divergences between student p and teacher q on aligned log-probabilities: their value and their reward."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.objectives.logprobs import close_slots

LARGEST_LOG_RATIO = 40.0
"""Largest log q - log p that is exponentiated: losses and squared gradients still fit into float32."""


class Divergence(ABC):
    """A divergence D(p, q) = sum over v of terms in p(v) and q(v); 0 where p = q, never negative for distributions.

    Both methods take log-probabilities aligned slot by slot, [n, K] or [n, V], in nats. -inf and masked slots count as
    probability 0 (see `LOG_ZERO`) and receive no gradient.
    """

    def value(self, student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of the terms of each row, [n] in nats, differentiable in both arguments.

        It is the divergence only where both sides sum to 1 over the slots: normalise first.

        Args:
            student_log_probs: [n, K] log p.
            teacher_log_probs: [n, K] log q.
            mask: bool [n, K], True where a slot counts; None when all do.
        """
        return self.terms(close_slots(student_log_probs, mask), close_slots(teacher_log_probs, mask)).sum(-1)

    def reward(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """Reward [n, K] of proposing each token: -dD/dp(v), shifted so that it is 0 where p(v) = q(v).

        sum_v p(v) reward(v) grad log p(v) = -grad D over a full distribution, whatever the shift. This shift makes
        every weighting and every support stand still at p = q.

        Args:
            student_log_probs: [n, K] log p.
            teacher_log_probs: [n, K] log q.
        """
        return self.reward_at(close_slots(student_log_probs), close_slots(teacher_log_probs))

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Summands of D for finite log-probabilities."""

    @abstractmethod
    def reward_at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Reward for finite log-probabilities."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p || q): the student is punished for tokens that the teacher finds unlikely (mode seeking).

    Reward log q - log p. A token with q = 0 is charged `LOG_ZERO` nats times p, not infinity.
    """

    @override
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p.exp() * (log_p - log_q)

    @override
    def reward_at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q - log_p


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(q || p): the student is punished for missing tokens that the teacher likes (mass covering).

    Reward q / p - 1, unbounded where the student hardly proposes what the teacher wants; log q - log p is cut at
    `LARGEST_LOG_RATIO` before the exponential.
    """

    @override
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (log_q - log_p)

    @override
    def reward_at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q - log_p).clamp(max=LARGEST_LOG_RATIO).expm1()


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence, b KL(q || M) + (1 - b) KL(p || M) with M = b q + (1 - b) p.

    At most log 2 nats for beta = 1/2, and gentle where one side is nearly 0. Both ends would vanish by the formula;
    they are defined as the limits after division by b and by 1 - b: beta = 0 is the forward, beta = 1 the reverse KL
    (arXiv 2306.13649). Reward -(1 - b) log(p / M).

    Args:
        beta: b in [0, 1], the teacher's share in M.

    Raises:
        ValueError: beta lies outside [0, 1].
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(
                "divergence.beta: expected a number in [0, 1] (0 is the forward KL, 1 the reverse KL), got"
                f" {self.beta}."
            )

    @override
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if (end := self._end()) is not None:
            return end.terms(log_p, log_q)
        log_m = self._log_mixture(log_p, log_q)
        return self.beta * log_q.exp() * (log_q - log_m) + (1 - self.beta) * log_p.exp() * (log_p - log_m)

    @override
    def reward_at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if (end := self._end()) is not None:
            return end.reward_at(log_p, log_q)
        return (1 - self.beta) * (self._log_mixture(log_p, log_q) - log_p)

    def _end(self) -> Divergence | None:
        if self.beta == 0:
            return ForwardKL()
        return ReverseKL() if self.beta == 1 else None

    def _log_mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.logaddexp(log_q + math.log(self.beta), log_p + math.log1p(-self.beta))
