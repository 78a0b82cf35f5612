"""The task's marks beside the teacher's: rewards compared within a prompt's group, added to every token's advantage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, ResponseTokens, Rollout, TeacherScores

GROUP_ADVANTAGE = "group_advantage"
STEP_WEIGHT = "step_weight"
_LEAST_DEVIATION = 1e-6


class GroupReward(Advantage):
    """A = distillation x w x (log q - log p) + reward x (r - mean of r) / deviation of r, over the group of a prompt.

    r is what the task gave a response, from 0 to 1; all of its tokens share the second term (GRPO, arXiv 2402.03300). w
    is the extra `step_weight` where a token weighting has attached one, and 1 elsewhere. A group of equal marks adds
    nothing, so without any difference in marks this is plain distillation times `distillation`.

    Args:
        reward: Factor of the marks' part; 0 leaves it out.
        distillation: Factor of the teacher's part; 0 leaves plain GRPO.
        divide_by_deviation: Whether differences of marks are divided by their standard deviation in the group (the
            unbiased one); without it (Dr. GRPO, arXiv 2503.20783) groups in which nearly all agree count less.

    Raises:
        ValueError: A factor is negative or not finite; in a run, responses have no marks or no group.
    """

    compares_marks = True

    def __init__(self, reward: float = 1.0, distillation: float = 1.0, divide_by_deviation: bool = True) -> None:
        for name, factor in {"reward": reward, "distillation": distillation}.items():
            if not 0 <= factor < math.inf:
                raise ValueError(f"advantage.{name}: expected a finite number of at least 0, got {factor}.")
        self.reward, self.distillation, self.divide_by_deviation = reward, distillation, divide_by_deviation

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        return [self._compared(group) for group in groups]

    @override
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        if STEP_WEIGHT in tokens.extras:
            rewards = tokens.extras[STEP_WEIGHT].to(rewards) * rewards
        advantages = self.distillation * rewards
        if GROUP_ADVANTAGE not in tokens.extras:  # who looks on from outside of a step knows no groups
            return advantages
        return advantages + self.reward * tokens.extras[GROUP_ADVANTAGE].to(rewards)

    def _compared(self, group: Sequence[Rollout]) -> list[Rollout]:
        if len(group) < 2:
            raise ValueError(
                "objective.advantage: GroupReward compares the responses to a prompt with each other, and there is one."
                " Set data.rollouts_per_prompt to 2 or more."
            )
        marks = torch.tensor([rollout.reward for rollout in group], dtype=torch.float64)
        if bool(marks.isnan().any()):
            raise ValueError(
                f"objective.advantage: GroupReward needs marks, and responses to {group[0].problem.uid!r} have none."
                " Use a task that marks all problems, and data.horizon: null."
            )
        advantages = marks - marks.mean()
        if self.divide_by_deviation:
            advantages = advantages / marks.std().clamp(min=_LEAST_DEVIATION)
        return [
            replace(
                rollout, extras={**rollout.extras, GROUP_ADVANTAGE: torch.full((len(rollout.response_ids),), value)}
            )
            for rollout, value in zip(group, advantages.tolist(), strict=True)
        ]
