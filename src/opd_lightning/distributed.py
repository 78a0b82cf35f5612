"""Several processes that train together: who am I, how many are we, what does everybody have. Knows torch only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

T = TypeVar("T")
_is_alone = False


class OutOfReach(RuntimeError):
    """The other processes were asked for something where they do not answer."""


@contextmanager
def alone() -> Iterator[None]:
    """Inside, to ask the other processes is an error and not a wait: they are elsewhere, or gone."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the first."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(mine: T) -> list[T]:
    """What each process passed, in the order of ranks; the same list everywhere."""
    if world_size() == 1:
        return [mine]
    if _is_alone:
        raise OutOfReach("part of it lies on the other processes")
    everyone: list[T] = [mine] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers that the processes pass, the same everywhere: one small tensor, so cheap every step.

    Args:
        number: What this process passes.
        device: Where the process group can reduce: its GPU for NCCL.
    """
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def agree(score: float) -> float:
    """Mean score over all processes, computed from the same list everywhere so that no two can decide differently.

    A NaN or an infinity on one process makes the mean NaN.
    """
    scores = gather_objects(score)
    if not all(math.isfinite(value) for value in scores):
        return math.nan
    return scores[0] if len(set(scores)) == 1 else math.fsum(scores) / len(scores)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only (FSDP2)."""
    return isinstance(tensor, DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether processes hold parts of the module's weights, so that all must run it together."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """The processes over which a module's weights are cut up; None when this one has them whole."""
    return next((weight.device_mesh for weight in module.parameters() if isinstance(weight, DTensor)), None)


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective call for a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor, sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
