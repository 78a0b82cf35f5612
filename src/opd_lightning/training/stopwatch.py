"""Where the wall-clock time of a step goes, and what memory its parts hold. Knows parts by name only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd_lightning.training.peak_memory import PeakMemory


class Stopwatch:
    """Adds up wall-clock seconds per named part, and knows the most memory held during each.

    Args:
        device: Where the work is done.
        is_exact: Wait for the GPU at both ends, so that the parts are true. Without waiting they tell when work was
            handed over, and the GPU may run ahead.
        measures_memory: Look at the memory too.

    Attributes:
        seconds: Of each part so far.
        memory_gb: Most gigabytes held during each part; `between_steps` is what came before the first.

    Raises:
        ValueError: The memory cannot be measured here.
    """

    def __init__(self, device: torch.device, *, is_exact: bool = True, measures_memory: bool = False) -> None:
        self.device = device
        self.is_exact = is_exact
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory_gb: dict[str, float] = defaultdict(float)
        self._memory = PeakMemory(device) if measures_memory else None

    def restart(self) -> None:
        """A new step begins."""
        self.seconds.clear()
        self.memory_gb.clear()
        self._note_peak("between_steps")

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`."""
        self._wait()
        if self._memory is not None:
            self._memory.restart()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[part] += time.perf_counter() - started
            self._note_peak(part)

    def _note_peak(self, part: str) -> None:
        if self._memory is not None:
            self.memory_gb[part] = max(self.memory_gb[part], 1e-9 * self._memory.read())
            self._memory.restart()

    def _wait(self) -> None:
        if self.is_exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
