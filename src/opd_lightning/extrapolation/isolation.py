"""Look at a model without leaving a trace: random state, train/eval modes and gradients stay as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from opd_lightning.interfaces.modes import evaluation_mode


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the random generators inside the block, and put them back to where they were afterwards.

    Covers Python, NumPy (when loaded), torch on the CPU and on every CUDA device (when CUDA is in use). Generators of
    other accelerators are left alone.

    Args:
        seed: Non-negative integer below 2**32.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            if numpy:
                numpy.random.seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def undisturbed(module: nn.Module | None, seed: int) -> Iterator[None]:
    """Evaluate without gradients, in eval mode and from a fixed random state; restore all of it afterwards.

    Args:
        module: The module to put into eval mode; None leaves modes to the caller.
        seed: Random state inside the block. The same seed for all candidates of one search means that they are
            compared on common random numbers.
    """
    modes = nullcontext() if module is None else evaluation_mode(module)
    with modes, isolated_rng(seed), torch.no_grad():
        yield
