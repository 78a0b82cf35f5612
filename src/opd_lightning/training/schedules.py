"""Learning-rate schedules, counted in optimiser steps. Does not know models or trainers."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Decay = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int, *, warmup_steps: int, decay: Decay, total_steps: int | None, final_factor: float
) -> float:
    """Factor on the base learning rate for the optimiser step that comes after `step` finished ones.

    Rises linearly over the first `warmup_steps` steps (the first step already gets 1 / warmup_steps), then stays or
    falls to `final_factor` at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "constant":
        return 1.0
    assert total_steps is not None
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    remaining = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_factor + (1 - final_factor) * remaining


class WarmupDecay(LambdaLR):
    """Linear warm-up, then constant, linear or cosine decay.

    Args:
        optimizer: The optimiser whose learning rates are scheduled.
        warmup_steps: Steps until the full learning rate is reached; 0 starts with it.
        decay: What happens after the warm-up.
        total_steps: Step at which the decay ends; needed by linear and cosine.
        final_factor: Share of the learning rate left at the end.

    Raises:
        ValueError: `total_steps` is missing or not larger than `warmup_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        total_steps: int | None = None,
        final_factor: float = 0.0,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"lr_scheduler.warmup_steps: expected 0 or more, got {warmup_steps}.")
        if not 0 <= final_factor <= 1:
            raise ValueError(f"lr_scheduler.final_factor: expected a number in [0, 1], got {final_factor}.")
        if decay != "constant" and (total_steps is None or total_steps <= warmup_steps):
            raise ValueError(
                f"lr_scheduler.total_steps: decay={decay!r} needs the step at which it ends, larger than"
                f" warmup_steps={warmup_steps}; got {total_steps}. Set it to trainer.max_steps."
            )
        self.warmup_steps, self.decay = warmup_steps, decay
        self.total_steps, self.final_factor = total_steps, final_factor
        super().__init__(optimizer, lambda step: self._factor(step))

    def _factor(self, step: int) -> float:
        return learning_rate_factor(  # of the settings in its state: a resumed run goes on along the same curve
            step,
            warmup_steps=self.warmup_steps,
            decay=self.decay,
            total_steps=self.total_steps,
            final_factor=self.final_factor,
        )
