"""OPSD: the divergence from a teacher that knows the solution, each token's share of it bounded (arXiv 2601.18734)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from opd_lightning.objectives import Divergence
from opd_lightning.objectives.divergences import LARGEST_LOG_RATIO


@dataclass(frozen=True)
class ClippedForwardKL(Divergence):
    """KL(q || p), the term q(v) log(q(v) / p(v)) of each vocabulary entry bounded by `tau`.

    A teacher with the solution before it is very sure of single tokens (a word of its style, a number), whose terms
    would drown all others; a bounded term has no gradient. Terms below 0 stay as they are.

    Args:
        tau: Bound in nats; infinity is the forward KL.

    Raises:
        ValueError: It is not positive.

    Source: arXiv 2601.18734, third version.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"divergence.tau: expected a positive number (.inf for no bound), got {self.tau}.")

    @override
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).clamp(max=self.tau)

    @override
    def reward_at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_ratio = log_q - log_p
        ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
        return ratio * (log_q.exp() * log_ratio <= self.tau) - 1
