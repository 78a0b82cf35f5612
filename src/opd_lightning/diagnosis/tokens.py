"""Facts of response tokens: over all of them, by position in the response, and as one number of a rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_lightning.diagnosis.estimates import auroc, is_right
from opd_lightning.diagnosis.measurements import PositionBin
from opd_lightning.interfaces import TrainedRollout


def mean_facts(compared: Sequence[TrainedRollout]) -> dict[str, float | None]:
    """Mean of each fact over all tokens where it is defined; None where it is defined nowhere."""
    return {name: _nan_mean(values) for name, values in _columns(compared).items()}


def facts_by_position(compared: Sequence[TrainedRollout], num_bins: int) -> tuple[PositionBin, ...]:
    """Mean facts in bins of equal width, from the first position to that of the longest response.

    Args:
        compared: What is known of each rollout.
        num_bins: Most bins; fewer when the longest response has fewer tokens.
    """
    positions = torch.cat([each.rollout.trained_positions for each in compared])
    columns = _columns(compared)
    width = math.ceil((int(positions.max()) + 1) / num_bins)
    bins = []
    for first in range(0, int(positions.max()) + 1, width):
        inside = (positions >= first) & (positions < first + width)
        facts = {name: _nan_mean(values[inside]) for name, values in columns.items()}
        last = min(first + width - 1, int(positions.max()))
        bins.append(PositionBin(first, last, int(inside.sum()), facts))
    return tuple(bins)


def global_reward(compared: TrainedRollout) -> float:
    """(1/T) sum over tokens of log q(y_t) - log p(y_t): what the teacher thinks of a whole answer (arXiv 2604.13016).

    NaN where the teacher says nothing of its tokens.
    """
    return -float(compared.facts["sampled_log_ratio"].double().mean()) if len(compared.losses) else math.nan


def reward_auroc(compared: Sequence[TrainedRollout]) -> tuple[float | None, int | None]:
    """How well `global_reward` tells fully right answers from the others, and how many are right.

    None and None where the task marks nothing.
    """
    if any(math.isnan(each.rollout.reward) for each in compared):
        return None, None
    rewards = [(global_reward(each), is_right(each.rollout)) for each in compared]
    right = [reward for reward, is_positive in rewards if is_positive]
    return auroc(right, [reward for reward, is_positive in rewards if not is_positive]), len(right)


def _columns(compared: Sequence[TrainedRollout]) -> Mapping[str, Tensor]:
    return {name: torch.cat([each.facts[name] for each in compared]) for name in compared[0].facts}


def _nan_mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.double().mean()) if len(known) else None
