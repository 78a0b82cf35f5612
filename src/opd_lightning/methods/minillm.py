"""MiniLLM: a token answers for what comes after it, too (arXiv 2306.08543)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, Rollout, ScoreRequest, TeacherScores
from opd_lightning.objectives import Clipped, Importance, ReverseKL, SampledTokenObjective, StudentScores
from opd_lightning.objectives.logprobs import close_slots
from opd_lightning.rollouts.shaping import attach


class LongReturn(SampledTokenObjective):
    """The reverse KL of whole answers: of each state exactly, and of what follows by a policy gradient.

    The loss of token y_t is KL(p || q) at its state, minus F_t log p(y_t). F_t is detached, the return of the tokens
    after it: sum over j >= 1 of gamma^j l_(t+j), with l the log-ratio log q - log p_rollout of a sampled token; with
    `length_normalized` divided by the same sum of gamma^j, so that long answers do not weigh more.

    Args:
        gamma: Discount of what comes later: 1 in the paper, 0 leaves the reverse KL of each state alone.
        length_normalized: Take the mean of what follows, not the sum.
        single_step: Compute the part of the token itself exactly. Without it the token's own log-ratio is part of the
            policy gradient, whose expectation is the same, and the teacher needs to score sampled tokens only.
        importance: Correction for tokens drawn with older weights or by another engine; null for none.
        settings: Of `SampledTokenObjective`. `advantage_clip` bounds each log-ratio.

    Raises:
        ValueError: A setting is outside its range.

    Source: arXiv 2306.08543; https://github.com/microsoft/LMOps/tree/main/minillm by way of TRL.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        length_normalized: bool = True,
        single_step: bool = True,
        importance: Importance | None = Clipped(),  # noqa: B008
        **settings: Any,
    ) -> None:
        super().__init__(importance=importance, **settings)
        if not 0 <= gamma <= 1:
            raise ValueError(f"objective.gamma: expected a number in [0, 1] (0: nothing that follows), got {gamma}.")
        if type(self.divergence) is not ReverseKL or self.advantage is not None:
            raise ValueError(
                "objective.divergence, objective.advantage: LongReturn is made of log-ratios, those of the reverse KL"
                " without an advantage of another kind. Leave both out."
            )
        self.gamma = gamma
        self.length_normalized = length_normalized
        self.single_step = single_step
        self.needs_log_ratios = self.needs_rollout_log_probs = True

    @override
    def request(self) -> ScoreRequest:
        needed = super().request()
        return replace(needed, full_vocabulary=True) if self.single_step else needed

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        return [[self._with_return(rollout) for rollout in group] for group in super().shape(groups)]

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        if not self.single_step:
            return super().losses_from(student, teacher, tokens)
        assert teacher is not None
        log_p = student.full()
        log_probs = close_slots(student.at(tokens.ids[:, None]).squeeze(-1))
        following = tokens.extras["following"].to(log_probs)
        return ReverseKL().value(log_p, teacher.full().to(log_p)) + self.surrogate(following, log_probs, tokens)

    @override
    def _advantages(
        self, log_probs: Tensor, student: StudentScores, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        rewards = super()._advantages(log_probs, student, teacher, tokens)
        return rewards + tokens.extras["following"].to(rewards)

    def _with_return(self, rollout: Rollout) -> Rollout:
        places = rollout.trained_positions
        following = torch.zeros(len(rollout.response_ids))
        following[places] = returns_after(
            rollout.extras["log_ratio"][places], self.gamma, length_normalized=self.length_normalized
        ).float()
        return attach(rollout, following=following)


def returns_after(log_ratios: Tensor, gamma: float, *, length_normalized: bool) -> Tensor:
    """Discounted sums (or means) [T] in float64 of what comes after each token: 0 after the last, and with gamma 0.

    Args:
        log_ratios: [T] of one answer's tokens.
        gamma: Discount of each place further on.
        length_normalized: Divide by the sum of the discounts.
    """
    sums, weights = [0.0], [0.0]
    for value in reversed(log_ratios.double().tolist()[1:]):
        sums.append(gamma * (value + sums[-1]))
        weights.append(gamma * (1 + weights[-1]))
    found = torch.tensor(sums[::-1], dtype=torch.float64)[: len(log_ratios)]
    if not length_normalized:
        return found
    return found / torch.tensor(weights[::-1], dtype=torch.float64)[: len(log_ratios)].clamp(min=1e-12)
