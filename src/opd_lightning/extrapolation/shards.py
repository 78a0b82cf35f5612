"""Several processes, sharded weights (DTensor): work on what this process holds, exchange numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

T = TypeVar("T")


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
    everyone: list[T] = [mine] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def agree(score: float) -> float:
    """Mean score over all processes, computed from the same list everywhere so that no two can decide differently.

    A NaN or an infinity on one process makes the mean NaN.
    """
    scores = gather_objects(score)
    if not all(math.isfinite(value) for value in scores):
        return math.nan
    return scores[0] if len(set(scores)) == 1 else math.fsum(scores) / len(scores)


def reshard(module: nn.Module) -> None:
    """Free the gathered copies that FSDP2 keeps after a forward pass without gradients.

    While they exist the model computes with them, so an edit of the shards would be lost on the root module's weights.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def any_sharded(weights: Iterable[Tensor]) -> bool:
    """Whether at least one weight is a DTensor."""
    return any(isinstance(weight, DTensor) for weight in weights)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def with_placement(local: Tensor, like: Tensor) -> Tensor:
    """Declare `local` to be this process's shard of a tensor distributed as `like` is."""
    if not isinstance(like, DTensor):
        return local
    on_device = local.to(local_shard(like).device)
    return DTensor.from_local(
        on_device, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(local: Tensor, like: Tensor) -> Tensor:
    """The full tensor of which `local` is this process's shard; a collective call when `like` is a DTensor."""
    shards = with_placement(local, like)
    return shards.full_tensor() if isinstance(shards, DTensor) else shards


def export_shard(local: Tensor, like: Tensor, *, gathered: bool) -> Tensor | None:
    """What to save of a shard: itself, or the full tensor on the first process's CPU and None on the others."""
    if not isinstance(like, DTensor):
        return local
    if not gathered:
        return with_placement(local, like)
    full = whole(local, like)
    return full.cpu() if rank() == 0 else None


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that is distributed as `like` is, or that every process has in full."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return local_shard(tensor)
    on_device = tensor.to(local_shard(like).device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None).to_local()


def sum_over_shards(sums: Sequence[tuple[Tensor, Sequence[float]]]) -> list[float]:
    """Add up per-weight sums: shards over all processes that hold one, replicas once.

    Args:
        sums: For each weight the weight itself and its local sums, the same quantities in the same order for all.

    Returns:
        One total per quantity, the same on every process.
    """
    groups: dict[object, tuple[Tensor, Tensor]] = {}
    for weight, values in sums:
        key = (weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else None
        local = torch.tensor(values, dtype=torch.float64)
        groups[key] = (weight, groups[key][1] + local) if key in groups else (weight, local)
    total = torch.zeros(len(sums[0][1]), dtype=torch.float64)
    for weight, local in groups.values():
        if isinstance(weight, DTensor):
            placements = [Replicate() if placement.is_replicate() else Partial() for placement in weight.placements]
            on_device = local.to(local_shard(weight).device)
            local = DTensor.from_local(on_device, weight.device_mesh, placements, run_check=False).full_tensor().cpu()
        total += local
    return [float(value) for value in total]
