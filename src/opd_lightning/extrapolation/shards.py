"""Several processes, sharded weights (DTensor): work on what this process holds, exchange numbers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from opd_lightning.distributed import rank


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
