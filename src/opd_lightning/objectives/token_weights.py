"""From the weight of each token to the loss of a step: what is summed, and what the sum is divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_lightning.interfaces import MicroBatch, Normalizer, TokenWeighting


def weigh_tokens(weighting: TokenWeighting, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
    """Weights [N] of a micro-batch's response tokens, checked; with "sequences" divided by each response's length.

    Raises:
        ValueError: They are not one finite number of at least 0 per token.
    """
    with torch.no_grad():
        weights = weighting(facts, micro_batch)
        name = type(weighting).__name__
        if weights.shape != micro_batch.tokens.ids.shape:
            raise ValueError(
                f"model.token_weighting: {name} gave weights of shape {tuple(weights.shape)}; expected one per response"
                f" token, {tuple(micro_batch.tokens.ids.shape)}."
            )
        weights = weights.float()
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"model.token_weighting: {name} gave a weight that is negative or not finite. Facts are NaN where they"
                " are not defined (docs/metrics.md): say what those tokens weigh, for example with nan_to_num."
            )
        if weighting.normalizer == "sequences":
            lengths = torch.tensor([len(rollout.trained_positions) for rollout in micro_batch.rollouts])
            weights = weights / lengths.to(weights.device)[micro_batch.rows]
        return weights


def known_divisor(normalizer: Normalizer, micro_batches: Sequence[MicroBatch]) -> int | None:
    """What this process adds to the divisor of a step; None when only the weights themselves say."""
    if normalizer == "all_tokens":
        return sum(micro_batch.num_tokens for micro_batch in micro_batches)
    if normalizer == "sequences":
        return sum(len(micro_batch.rollouts) for micro_batch in micro_batches)
    return None
