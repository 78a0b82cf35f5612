"""Means of what training told of single tokens, over all processes: what sources and horizons decide by."""

from __future__ import annotations

import math

import torch

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import StepFacts


def mean_over_processes(facts: StepFacts, name: str, first: int = 0) -> float:
    """Mean of a fact over the tokens of all processes where it is defined, the same everywhere.

    Args:
        facts: Of this process.
        name: Of the fact.
        first: Position in the response of the first token that counts.

    Returns:
        NaN where it is defined for no token.
    """
    values = [
        trained.facts[name][trained.rollout.trained_positions >= first]
        for trained in facts.rollouts
        if name in trained.facts
    ]
    known = torch.cat(values) if values else torch.zeros(0)
    known = known[~known.isnan()].double()
    pairs = gather_objects((float(known.sum()), known.numel()))
    count = sum(number for _, number in pairs)
    return math.fsum(total for total, _ in pairs) / count if count else math.nan
