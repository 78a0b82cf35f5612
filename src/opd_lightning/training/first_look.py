"""A step looked at before it is trained: for token weightings that must know all of it to say what counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from opd_lightning.interfaces import Rollout, TokenWeighting, TrainedRollout
from opd_lightning.rollouts.comparison import Comparison
from opd_lightning.training.metrics import Means, comparison_statistics


def look_first(
    weighting: TokenWeighting, comparisons: Iterator[Comparison], metrics: Means
) -> tuple[list[Rollout], list[TrainedRollout]]:
    """Compare all of a step without gradient, and let the weighting say what of it is trained.

    Logits exist for a chunk of tokens at a time, as in training; what is kept of a token are its facts.

    Args:
        weighting: One that looks first.
        comparisons: Of the step, one micro-batch after the other.
        metrics: Hears of the whole step.

    Returns:
        The rollouts to train, and the whole step with its losses and facts.

    Raises:
        ValueError: The weighting gave others back than it was given, or nothing of one.
    """
    with torch.no_grad():
        compared = list(comparisons)
    metrics.update(*comparison_statistics(compared))
    seen = [rollout for each in compared for rollout in each.by_rollout()]
    rollouts = list(weighting.look(seen))
    if [each.seed for each in rollouts] != [each.rollout.seed for each in seen]:
        raise ValueError(
            f"model.token_weighting: {type(weighting).__name__}.look must return the same rollouts in the same order."
        )
    for rollout, whole in zip(rollouts, seen, strict=True):
        places, there = rollout.trained_positions, whole.rollout.trained_positions
        if (len(there) and not len(places)) or not torch.isin(places, there).all():
            raise ValueError(
                f"model.token_weighting: {type(weighting).__name__}.look must keep some of the tokens that the student"
                f" wrote, of every rollout and no others; that of problem {rollout.problem.uid!r} is left with"
                f" {len(places)} tokens."
            )
    return rollouts, seen
