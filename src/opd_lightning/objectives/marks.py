"""The marks of a prompt's answers, compared with one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd_lightning.interfaces import Rollout

GROUP_ADVANTAGE = "group_advantage"


def marks_of(group: Sequence[Rollout], owner: str) -> Tensor:
    """Rewards float64 [n] of a prompt's answers.

    Args:
        group: The answers.
        owner: Setting and class that need them.

    Raises:
        ValueError: There is one answer only, or one without a mark.
    """
    if len(group) < 2:
        raise ValueError(
            f"data.rollouts_per_prompt: {owner} compares the answers to a prompt with one another, got"
            f" {len(group)}. Set it to 2 or more."
        )
    marks = torch.tensor([rollout.reward for rollout in group], dtype=torch.float64)
    if bool(marks.isnan().any()):
        raise ValueError(
            f"data.task: {owner} needs marked answers, but those to problem {group[0].problem.uid!r} have no mark. Use"
            " a task that marks all its problems, and data.horizon: null."
        )
    return marks


def group_advantages(marks: Tensor, scaled: bool = True) -> Tensor:
    """Marks [n] of a group less their mean, divided by their standard deviation if wanted; 0 where all are the same.

    Args:
        marks: Of one prompt's answers.
        scaled: Divide as GRPO does (arXiv 2402.03300), by the deviation with n - 1 under the root.
    """
    if bool((marks == marks[0]).all()):
        return torch.zeros_like(marks)
    centred = marks - marks.mean()
    return centred / marks.std() if scaled else centred


def with_group_advantages(group: Sequence[Rollout], marks: Tensor, scaled: bool = True) -> list[Rollout]:
    """A prompt's answers with the extra `group_advantage`, the same for all tokens of an answer."""
    return [
        replace(rollout, extras={**rollout.extras, GROUP_ADVANTAGE: torch.full((len(rollout.response_ids),), value)})
        for rollout, value in zip(group, group_advantages(marks, scaled).tolist(), strict=True)
    ]
