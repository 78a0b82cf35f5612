"""From the weight of each token to the loss of a step: what is summed, and what the sum is divided by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from opd_lightning.interfaces import MicroBatch, Normalizer, TokenWeighting


def weigh_tokens(weighting: TokenWeighting, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
    """Weights [N] of a micro-batch's response tokens, as the weighting gives them, checked.

    Raises:
        ValueError: They are not one finite number of at least 0 per token.
    """
    with torch.no_grad():
        weights = weighting(facts, micro_batch)
        name = type(weighting).__name__
        if not isinstance(weights, Tensor) or weights.shape != micro_batch.tokens.ids.shape:
            gave = f"weights of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
            raise ValueError(
                f"model.token_weighting: {name} gave {gave}; expected a tensor with one weight per response token,"
                f" of shape {tuple(micro_batch.tokens.ids.shape)}."
            )
        weights = weights.detach().to(micro_batch.rows.device, torch.float32)  # rollouts are on the CPU
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(
                f"model.token_weighting: {name} gave a weight that is negative or not finite. Facts are NaN where they"
                " are not defined (docs/metrics.md): say what those tokens weigh, for example with nan_to_num."
            )
        return weights


def loss_factors(weights: Tensor, normalizer: Normalizer, micro_batch: MicroBatch) -> Tensor:
    """What the losses [N] of a micro-batch are multiplied by before they are summed up.

    The weights; with "sequences" divided by the number of tokens of their response.
    """
    if normalizer == "sequences":
        return weights / micro_batch.rows.bincount()[micro_batch.rows]
    return weights


def known_divisor(normalizer: Normalizer, micro_batches: Sequence[MicroBatch]) -> int | None:
    """What this process adds to the divisor of a step; None when only the weights themselves say.

    Raises:
        ValueError: There is no such normaliser.
    """
    if normalizer == "all_tokens":
        return sum(micro_batch.num_tokens for micro_batch in micro_batches)
    if normalizer == "sequences":
        rollouts = [rollout for micro_batch in micro_batches for rollout in micro_batch.rollouts]
        return sum(rollout.num_trained > 0 for rollout in rollouts)
    if normalizer == "kept_tokens":
        return None
    raise ValueError(
        f"model.token_weighting.normalizer: expected one of {', '.join(get_args(Normalizer))}, got {normalizer!r}."
    )


def divide_gradients(parameters: Iterable[nn.Parameter], divisor: float) -> None:
    """Turn gradients that were summed up into means; without any weight (a divisor of 0) they are 0 and stay so."""
    for parameter in parameters:
        if parameter.grad is not None and divisor > 0:
            parameter.grad.div_(divisor)
