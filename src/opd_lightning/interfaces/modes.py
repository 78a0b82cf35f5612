"""Train and eval mode of a model that somebody else is training. Knows torch only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off inside the block.

    Every submodule gets its own mode back afterwards, so that a part frozen in eval mode stays frozen.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
