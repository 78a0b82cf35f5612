"""General token weightings: by where a token stands, and by how uncertain the student is there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Normalizer, TokenWeighting


class PositionWeights(TokenWeighting):
    """A token counts for less the later it stands in its response: floor + (1 - floor) 2^(-position / half_life).

    Args:
        half_life: Tokens after which what is above the floor has halved; a negative one makes late tokens count more,
            up to 2^(most tokens / -half_life) times.
        floor: What the last tokens of an endless response would count.
        normalizer: What the weighted sum is divided by; with "kept_tokens" only the proportions of weights matter.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, half_life: float = 256.0, floor: float = 0.0, normalizer: Normalizer = "kept_tokens") -> None:
        if half_life == 0 or half_life != half_life:
            raise ValueError(
                f"token_weighting.half_life: expected a number of tokens other than 0, got {half_life}. For equal"
                " weights leave model.token_weighting out."
            )
        if not 0 <= floor <= 1:
            raise ValueError(f"token_weighting.floor: expected a number from 0 to 1, got {floor}.")
        self.half_life, self.floor, self.normalizer = half_life, floor, normalizer

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        return self.floor + (1 - self.floor) * torch.exp2(-micro_batch.tokens.positions / self.half_life)


class EntropyWeights(TokenWeighting):
    """A token counts by the student's entropy there, in nats, to some power: forks in the road count, formalities less.

    Args:
        power: Of the entropy: 0 is equal weights, a negative one makes certain tokens count more.
        least: Entropy below which all count as if they had this one; keeps certain tokens from vanishing.
        normalizer: What the weighted sum is divided by; with "kept_tokens" only the proportions of weights matter.

    Raises:
        ValueError: A number is out of range.
    """

    reads = ("student_entropy",)

    def __init__(self, power: float = 1.0, least: float = 1e-3, normalizer: Normalizer = "kept_tokens") -> None:
        if not abs(power) <= 8:
            raise ValueError(f"token_weighting.power: expected a number from -8 to 8, got {power}.")
        if not 0 < least < 100:
            raise ValueError(f"token_weighting.least: expected a positive number of nats, got {least}.")
        self.power, self.least, self.normalizer = power, least, normalizer

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        return facts["student_entropy"].clamp(min=self.least) ** self.power
