"""IW-OPD: early tokens of a response matter more (arXiv 2606.22600)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Normalizer, TokenWeighting


class RemainingSignal(TokenWeighting):
    """A token counts 1 + gain x the share of its response's signal that is still to come when it is reached.

    The signal of a token is |A|, the size of the log-ratio of teacher and student at the sampled token. So weights fall
    from 1 + gain at the first token towards 1, fast where the two disagree and not at all where they agree.

    Args:
        gain: What the first token counts beyond 1.
        normalizer: What the weighted sum is divided by. The mean weight is between 1 and 1 + gain, so "all_tokens", the
            published form, makes larger steps than plain distillation; "kept_tokens" does not.

    Raises:
        ValueError: The gain is negative.

    Source: arXiv 2606.22600, as TRL has it.
    """

    reads = ("sampled_log_ratio",)

    def __init__(self, gain: float = 0.5, normalizer: Normalizer = "all_tokens") -> None:
        if not 0 <= gain < 1e6:
            raise ValueError(f"token_weighting.gain: expected a number of at least 0, got {gain}.")
        self.gain, self.normalizer = gain, normalizer

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        return torch.cat([self._of_response(each) for each in micro_batch.by_rollout(facts["sampled_log_ratio"])])

    def _of_response(self, log_ratios: Tensor) -> Tensor:
        sizes = log_ratios.abs().double()
        before = sizes.cumsum(0) - sizes
        total = sizes.sum().clamp(min=torch.finfo(torch.float32).tiny)  # without any signal all of it is to come
        return 1 + self.gain * (1 - before / total).clamp(min=0)
