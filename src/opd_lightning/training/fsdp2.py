"""`FSDP2Strategy`: a student whose weights, gradients and moments are cut up over processes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from opd_lightning.training.checkpoint_files import is_remote
from opd_lightning.training.checkpoints import WholeCheckpoints
from opd_lightning.training.sharded_checkpoints import (
    distributed_like,
    is_sharded_checkpoint,
    read_sharded,
    write_sharded,
)


class FSDP2Strategy(ModelParallelStrategy):
    """Cuts the student up over all processes of all nodes (FSDP2); ``--trainer.strategy fsdp2`` is its short name.

    Each process holds its share of weights, gradients and moments; a layer is gathered while it computes. Rollouts,
    loss and gradient are those of one process, up to rounding.

    A checkpoint is a folder in which each process writes its shards, as plain checkpoint files (`sharded_checkpoints`):
    it is there whole or not at all, nothing in it is run when it is read, and any number of processes can resume it,
    under this strategy or another. All processes must see the folder.

    Args:
        process_group_backend: Who carries tensors between processes; None is nccl for GPUs and gloo for CPUs.
        timeout: How long a process waits for the others before it gives up.

    Attributes:
        keeps_shards: Says to callbacks that shards in a checkpoint may stay shards.
    """

    keeps_shards = True

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        # left to itself it would cut each layer's matrices within a node, which is another kind of parallelism
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        filepath = self.broadcast(filepath)
        if is_remote(filepath):
            raise ValueError(
                f"callbacks: a checkpoint of a student that is cut up is a folder, and {str(filepath)!r} is an address."
                " Save to a folder that all processes see (ModelCheckpoint.dirpath)."
            )
        write_sharded(checkpoint, Path(filepath), WholeCheckpoints().save_checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint_path = self.broadcast(checkpoint_path)
        if not is_remote(checkpoint_path) and is_sharded_checkpoint(Path(checkpoint_path)):
            return read_sharded(Path(checkpoint_path), self.device_mesh["data_parallel"])
        return WholeCheckpoints().load_checkpoint(checkpoint_path)

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        saved = checkpoint["state_dict"]
        cut = {name: distributed_like(tensor, own[name]) if name in own else tensor for name, tensor in saved.items()}
        self.lightning_module.load_state_dict(cut, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            for number, moments in saved["state"].items():
                for name, value in moments.items():
                    if isinstance(value, torch.Tensor):
                        moments[name] = distributed_like(value, weights[number])
        Strategy.load_optimizer_state_dict(self, checkpoint)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="The student cut up over all processes (FSDP2).")
