"""`SkippedSteps`: optimiser steps that a gradient which is not finite has cost, and when to stop."""

from __future__ import annotations

import warnings

from lightning import Trainer

from opd_lightning.training.usable_weights import way_back


class SkippedSteps:
    """Counts skipped steps; so many in a row stop the run.

    Args:
        most_in_a_row: Steps in a row that end the run.

    Attributes:
        total: Steps skipped since the start of training.
        in_a_row: Steps skipped since the last one that was taken.
    """

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.total = 0
        self.in_a_row = 0

    def count(self, gradient_norm: float, trainer: Trainer) -> None:
        """A step is skipped.

        Raises:
            FloatingPointError: It is one too many.
        """
        self.total += 1
        self.in_a_row += 1
        warnings.warn(
            f"Step skipped: the gradient norm is {gradient_norm} ({self.total} skipped so far)."
            " Check the learning rate, the precision and the teacher's scores.",
            stacklevel=3,
        )
        if self.in_a_row >= self.most_in_a_row:
            raise FloatingPointError(
                f"model.max_skipped_steps: {self.in_a_row} steps in a row had a non-finite gradient, so the weights"
                f" after step {trainer.global_step} are not to be trusted. {way_back(trainer)}"
            )

    def forget_row(self) -> None:
        """A step was taken."""
        self.in_a_row = 0
