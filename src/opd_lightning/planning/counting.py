"""Count what operations of torch hold and do, on tensors that have shapes only."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from opd_lightning.planning.hardware import Operation

_IN_SILUS = {  # what an entry of a function costs beside its bytes, measured on one x86 core
    "exp": 0.3,
    "log": 0.5,
    "sigmoid": 0.8,
    "silu": 1.0,
    "silu_backward": 1.2,
    "gelu": 1.2,
    "gelu_backward": 1.5,
    "tanh": 1.0,
    "_softmax": 1.0,
    "_log_softmax": 1.0,
    "logsumexp": 1.2,
    "sin": 1.0,
    "cos": 1.0,
    "cumsum": 2.0,
    "topk": 2.0,
    "sort": 20.0,
}
_READ_WHOLE = ("logsumexp", "topk", "sort")  # their cost is that of what they read


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every tensor from the operation that makes it to the moment nobody holds it, and adds up the work.

    Args:
        price: Seconds of an operation.

    Attributes:
        live: Bytes held now, by the part that was being run when they were made.
        peak: The same at the moment when most was held since `restart`.
        seconds: Of all operations since `restart`.
        num_calls: Their number.
        flops: Of matrix products among them.
        bytes: Read and written by them.
    """

    def __init__(self, price: Callable[[Operation], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._price = price
        self._part = "other"
        self._parts: dict[int, tuple[str, int]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Mapping[str, int] = {}
        self.seconds = self.flops = self.bytes = 0.0
        self.num_calls = 0

    def restart(self) -> None:
        """Work starts from nothing, the peak from what is held now."""
        self.seconds = self.flops = self.bytes = 0.0
        self.num_calls = 0
        self.peak = dict(self.live)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made in the block belongs to a part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def assign(self, tensor: Tensor | None, name: str) -> None:
        """A tensor that is there already belongs to a part."""
        if tensor is None:
            return
        key = id(tensor.untyped_storage())
        if key in self._parts:
            part, size = self._parts[key]
            self.live[part] -= size
            self.live[name] += size
            self._parts[key] = name, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it reads and makes."""
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not made and func._schema.is_mutable:
            made = given  # the steps of whole lists return nothing
        if func.namespace == "prim" or not made:
            return out
        known = {id(each.untyped_storage()) for each in given}
        is_view = all(id(each.untyped_storage()) in known for each in made) and not func._schema.is_mutable
        for each in made:
            self._follow(each)
        self._add(func, args, kwargs or {}, out, [] if is_view else [*given, *made], given, made)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._parts:
            return
        self._parts[key] = self._part, storage.nbytes()
        self.live[self._part] += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def _forget(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self.live[part] -= size

    def _add(
        self, func: Any, args: Any, kwargs: Any, out: Any, moved: list[Tensor], given: list[Tensor], made: list[Tensor]
    ) -> None:
        self.num_calls += 1
        packet, name = func._overloadpacket, func._schema.name.partition("::")[2]
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        factor = _IN_SILUS.get(name.rstrip("_"), 0.0)
        counted = moved[0] if moved and name in _READ_WHOLE else made[0]
        operation = Operation(
            flops=flops,
            bytes=sum(_bytes(each) for each in moved),
            entries=factor * counted.numel(),
            rows=_num_rows(given, made[0]) if flops else 0,
            is_low=bool(moved) and moved[0].dtype in (torch.bfloat16, torch.float16),
            is_attention="attention" in name,
        )
        self.flops += operation.flops
        self.bytes += operation.bytes
        self.seconds += self._price(operation)


def _num_rows(given: list[Tensor], made: Tensor) -> int:
    """Of the left factor of a product; of all of them where many are multiplied with one right factor."""
    if made.dim() < 2:
        return 0
    is_shared = made.dim() == 3 and given[-1].dim() == 3 and given[-1].stride(0) == 0
    return made.shape[0] * made.shape[1] if is_shared else made.shape[-2]


def _bytes(tensor: Tensor) -> int:
    """What is read of a tensor: entries that are the same place count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
