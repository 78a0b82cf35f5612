"""Means with their errors, and how well a number tells two kinds apart: pure functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opd_lightning.diagnosis.measurements import AnswerFacts, Estimate
from opd_lightning.interfaces import Rollout
from opd_lightning.rollouts.repetition import repetition_rate


def estimate_mean(groups: Sequence[Sequence[float]]) -> Estimate:
    """Mean of all values with a standard error that takes those of a group (a prompt) for dependent.

    The error is that of a ratio of sums over G groups: sqrt(G / (G - 1) * sum over groups of (sum of deviations)^2)
    divided by the number of values; with one value per group it is the ordinary standard error.

    Args:
        groups: Values by prompt; empty groups count for nothing, and there is at least one value.
    """
    filled = [group for group in groups if group]
    num_values = sum(len(group) for group in filled)
    mean = math.fsum(value for group in filled for value in group) / num_values
    if len(filled) < 2:
        return Estimate(mean, None, len(filled))
    squares = math.fsum(math.fsum(value - mean for value in group) ** 2 for group in filled)
    return Estimate(mean, math.sqrt(len(filled) / (len(filled) - 1) * squares) / num_values, len(filled))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Probability that a positive value is above a negative one, ties counting half; None where a kind is missing."""
    if not positive or not negative:
        return None
    high, low = torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64).sort().values
    below, not_above = torch.searchsorted(low, high), torch.searchsorted(low, high, right=True)
    return float((below + not_above).double().mean()) / (2 * len(low))


def answer_facts(groups: Sequence[Sequence[Rollout]]) -> AnswerFacts:
    """What answers say, those of a prompt together."""
    rollouts = [rollout for group in groups for rollout in group]
    is_marked = not any(math.isnan(rollout.reward) for rollout in rollouts)
    mixed = [0 < sum(is_right(rollout) for rollout in group) < len(group) for group in groups]
    return AnswerFacts(
        accuracy=estimate_mean([[rollout.reward for rollout in group] for group in groups]) if is_marked else None,
        mixed_prompts=sum(mixed) / len(mixed) if is_marked and len(rollouts) > len(groups) else None,
        response_length=_mean([len(rollout.response_ids) for rollout in rollouts]),
        truncation_rate=_mean([not rollout.finished for rollout in rollouts]),
        repetition_rate=_mean([repetition_rate(rollout.response_ids) for rollout in rollouts]),
    )


def is_right(rollout: Rollout) -> bool:
    """Whether an answer is fully right."""
    return rollout.reward >= 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
