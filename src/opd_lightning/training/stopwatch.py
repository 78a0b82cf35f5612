"""Where the wall-clock time of a step goes. Knows parts by name only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up wall-clock seconds per named part.

    Args:
        device: Where the work is done.
        is_exact: Wait for the GPU at both ends, so that the parts are true. Without waiting they tell when work was
            handed over, and the GPU may run ahead.
    """

    def __init__(self, device: torch.device, *, is_exact: bool = True) -> None:
        self.device = device
        self.is_exact = is_exact
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        self._wait()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[part] += time.perf_counter() - started

    def _wait(self) -> None:
        if self.is_exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
