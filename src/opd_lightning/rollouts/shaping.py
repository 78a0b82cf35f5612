"""What is attached to the tokens of a step's rollouts before they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd_lightning.interfaces import MicroBatch, Objective, Rollout, Teacher, TeacherScores


def shape_groups(shaper: Objective | Teacher, rollouts: Sequence[Rollout], group_size: int) -> list[Rollout]:
    """Let a teacher or an objective attach values to rollouts, those of a prompt together.

    Args:
        shaper: Who attaches.
        rollouts: `group_size` of each prompt, next to each other.
        group_size: Rollouts per prompt.

    Raises:
        ValueError: It gave others back than it was given.
    """
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    shaped = [rollout for group in shaper.shape(groups) for rollout in group]
    if [rollout.seed for rollout in shaped] != [rollout.seed for rollout in rollouts]:
        setting = "teacher" if isinstance(shaper, Teacher) else "objective"
        raise ValueError(
            f"model.{setting}: {type(shaper).__name__}.shape must return the same rollouts in the same order."
        )
    return shaped


def attach_step(rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
    """Attach `step`, the number of the step in the run, counted from 0."""
    return [attach(rollout, step=torch.full((len(rollout.response_ids),), float(step))) for rollout in rollouts]


def attach(rollout: Rollout, **values: Tensor) -> Rollout:
    """The rollout with more values [T] of its tokens, by name."""
    return replace(rollout, extras={**rollout.extras, **values})


@torch.no_grad()
def attach_log_ratios(
    rollouts: Sequence[Rollout], micro_batches: Sequence[MicroBatch], scores: Iterable[TeacherScores]
) -> list[Rollout]:
    """Attach `log_ratio`, log q(y) - log p_rollout(y) of the tokens y that the student wrote.

    p_rollout is the student that answered, also where it was not alone in that (`RolloutEngine.blended`).

    Args:
        rollouts: With the log-probabilities that they were drawn with.
        micro_batches: The same rollouts, cut in any way.
        scores: The teacher's scores of these micro-batches, in their order.
    """
    found: dict[int, Tensor] = {}
    for batch, teacher in zip(micro_batches, scores, strict=True):
        own = batch.tokens.extras.get("student_log_prob", batch.tokens.rollout_log_probs)
        ratios = batch.by_rollout((teacher.sampled().to(own.device) - own).cpu())
        found |= {id(rollout): part for rollout, part in zip(batch.rollouts, ratios, strict=True)}
    attached = []
    for rollout in rollouts:
        values = torch.zeros(len(rollout.response_ids))
        values[rollout.trained_positions] = found[id(rollout)].float()
        attached.append(attach(rollout, log_ratio=values))
    return attached
