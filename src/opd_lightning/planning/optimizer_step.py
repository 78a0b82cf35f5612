"""An optimiser's step without data; where it needs data, what it holds after one on real weights of a few rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from opd_lightning.planning.counting import OperationCounter

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
_FEW = 2**17  # entries: above what 8-bit optimisers leave in 32 bits


class OptimizerStep:
    """Steps an optimiser over weights without data.

    One that reads numbers (Adafactor, say), or whose kernels know real memory only (bitsandbytes), is tried on real
    weights instead: of each shape two weights of few rows, between which what it holds grows by the row.

    Args:
        make_optimizer: Of the weights.
        weights: With gradients; none has data.
    """

    def __init__(self, make_optimizer: MakeOptimizer, weights: Sequence[nn.Parameter]) -> None:
        self._weights = weights
        self._optimizer: torch.optim.Optimizer | None = None
        self._state = torch.empty(0, dtype=torch.uint8)
        self._num_spare = 0
        try:
            self._optimizer = make_optimizer(weights)
            self._optimizer.step()
        except (RuntimeError, AttributeError):
            self._optimizer = None
            num_bytes, self._num_spare = _try_on_few_rows(make_optimizer, weights)
            self._state = torch.empty(num_bytes, dtype=torch.uint8)

    @property
    def is_fused(self) -> bool:
        """Whether it goes over each weight once, without a copy of them all."""
        return self._optimizer is not None and bool(self._optimizer.defaults.get("fused"))

    def step(self) -> None:
        """Another step: what it holds meanwhile, and at least what it reads and writes."""
        if self._optimizer is not None:
            self._optimizer.step()
            return
        spare = torch.empty(self._num_spare, dtype=torch.uint8)
        with torch.no_grad():
            for each in self._weights:
                each.add_(each)
        self._state.add_(1)
        del spare


def _try_on_few_rows(make_optimizer: MakeOptimizer, weights: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Bytes that are held for all the weights, and most that one of them needs during a step."""
    held, spare = 0.0, 0.0
    kinds = Counter((tuple(each.shape), each.dtype) for each in weights)
    with _disable_current_modes():
        for (shape, dtype), number in kinds.items():
            rows = max(2, -(-_FEW // max(1, math.prod(shape[1:]))))
            if len(shape) < 2 or shape[0] <= 2 * rows:
                state, meanwhile = _try(make_optimizer, shape, dtype)
            else:
                some, more = (_try(make_optimizer, (times * rows, *shape[1:]), dtype) for times in (1, 2))
                state, meanwhile = (a + (b - a) * (shape[0] / rows - 1) for a, b in zip(some, more, strict=True))
            held += number * state
            spare = max(spare, meanwhile)
    return int(held), int(spare)


def _try(make_optimizer: MakeOptimizer, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of the state, and most that is made during the second step."""
    weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer([weight])
    optimizer.step()
    with OperationCounter(lambda operation: 0.0) as counter:
        optimizer.step()
    sizes = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in _tensors(optimizer.state)}
    return float(sum(sizes.values())), float(sum(counter.peak.values()))


def _tensors(state: Any) -> Iterator[Tensor]:
    for each in state.values():
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict):
            yield from _tensors(each)
