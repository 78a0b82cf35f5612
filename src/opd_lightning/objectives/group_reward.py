"""The task's marks beside the teacher's: rewards compared within a prompt's group, added to every token's advantage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, ResponseTokens, Rollout, TeacherScores
from opd_lightning.objectives.marks import GROUP_ADVANTAGE, marks_of, with_group_advantages

STEP_WEIGHT = "step_weight"


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
        owner, scaled = "objective.advantage: GroupReward", self.divide_by_deviation
        return [with_group_advantages(group, marks_of(group, owner), scaled) for group in groups]

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
