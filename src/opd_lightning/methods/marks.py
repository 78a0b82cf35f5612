"""The marks of a prompt's answers, for methods that compare these with one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_lightning.interfaces import Rollout


def marks_of(group: Sequence[Rollout], owner: str) -> Tensor:
    """Rewards float32 [n] of a prompt's answers.

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
    marks = torch.tensor([rollout.reward for rollout in group])
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
        scaled: Divide as GRPO does (arXiv 2402.03300).
    """
    centred = marks - marks.mean()
    if not scaled or bool((centred == 0).all()):
        return centred
    return centred / marks.std(correction=0)
