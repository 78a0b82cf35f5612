"""`WholeCopy`: a student that is cut up over processes, whole again on each of them, to generate with."""

from __future__ import annotations

import torch
from torch import nn

from opd_lightning.distributed import gathered, is_sharded
from opd_lightning.interfaces import Student


class WholeCopy:
    """What an engine runs that generates with the live student, token by token.

    That is the student itself, except where it is cut up over processes: these are done with generating at different
    times, and a sharded model is gathered by all together. So each keeps a second copy of the weights, whole: no
    gradients and no moments, a quarter or less of what training takes.
    """

    def __init__(self) -> None:
        self._copy: nn.Module | None = None

    def of(self, student: Student, model: nn.Module, device: torch.device, *, is_current: bool) -> nn.Module:
        """The module to generate with; a collective call for a model that is cut up.

        Args:
            student: How to load a copy.
            model: The live student.
            device: Where a copy lives.
            is_current: Whether the weights are those that were asked for last.
        """
        if not is_sharded(model):
            return model
        if self._copy is None:
            is_current = False
            with torch.random.fork_rng():  # a fresh adapter is drawn; it is written over
                self._copy = student.load().to(device)
        if not is_current:
            with torch.no_grad():
                for own, whole in zip(model.parameters(), self._copy.parameters(), strict=True):
                    if own.requires_grad:  # all others are as they were loaded
                        whole.copy_(gathered(own))
        return self._copy

    def forget(self) -> None:
        """Let go of the copy."""
        self._copy = None
