"""AntiSD: the marks decide, and tokens that a hint alone makes likely are pushed away from (arXiv 2605.11609)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, ResponseTokens, Rollout, TeacherScores
from opd_lightning.objectives.marks import GROUP_ADVANTAGE, marks_of, with_group_advantages


class AntiSelfDistillation(Advantage):
    """A = A_GRPO - weight gate phi(u), with u = log q(y) - log p(y) and phi(u) = (softplus(u) - log 2) / 2.

    The teacher q is the student itself with a hint in its prompt, so u is the information that the hint and the token
    have in common. The expected push of -phi is up the Jensen-Shannon divergence, away from q: with any other teacher
    this unlearns it. Without a hint u is 0, and the advantage that of GRPO.

    Args:
        weight: lambda of an open gate.

    Attributes:
        gate: Factor on `weight`: the callback `EntropyGate` opens and closes it; 1 without.

    Raises:
        ValueError: The weight is negative.

    Source: arXiv 2605.11609.
    """

    compares_marks = True

    def __init__(self, weight: float = 0.5) -> None:
        if not weight >= 0:
            raise ValueError(f"advantage.weight: expected a number of at least 0, got {weight}.")
        self.weight = weight
        self.gate = 1.0

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        owner = "objective.advantage: AntiSelfDistillation"
        return [with_group_advantages(group, marks_of(group, owner)) for group in groups]

    @override
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        return tokens.extras[GROUP_ADVANTAGE].to(rewards) - self.weight * self.gate * information_penalty(rewards)


def information_penalty(log_ratios: Tensor) -> Tensor:
    """phi(u) = (softplus(u) - log 2) / 2 of log-ratios u: 0 at 0, slope sigmoid(u) / 2, at least -log(2) / 2."""
    return 0.5 * (torch.nn.functional.softplus(log_ratios) - math.log(2))
