"""Scores for any Lightning project."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opd_lightning.distributed import gather_objects, rank, world_size
from opd_lightning.extrapolation import isolated_rng
from opd_lightning.interfaces import Score


class HeldOutLoss(Score):
    """Negative mean loss on a few held-out batches, read once and kept on the CPU.

    Batch i is scored by process i modulo the number of processes, every process scores equally many (FSDP2 needs
    that) and the mean over batches is reduced. Each batch counts the same, whatever its size.

    Args:
        batches: Held-out batches, the same on every process (a DataLoader, a list); None takes the trainer's
            validation loader, which Lightning has already split over processes.
        loss: Name of a method of the module, or a function of module and batch, that returns a scalar loss for one
            batch. It should neither log nor update metrics: it is called in the middle of training.
        num_batches: How many batches to take from the front, over all processes.

    Raises:
        ValueError: `num_batches` is below 1; when fit starts also when there are no batches or no such method.
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        loss: str | Callable[[LightningModule, Any], Tensor] = "loss",
        num_batches: int = 8,
    ) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches: expected an integer of at least 1, got {num_batches}.")
        self.batches = batches
        self.loss = loss
        self.num_batches = num_batches
        self._kept: list[tuple[Any, bool]] = []

    def __call__(self, trainer: Trainer, module: LightningModule) -> float:
        """Return the negative mean loss over all batches, the same on all processes."""
        loss = self._loss_of(module)
        losses: list[float] = []
        for batch, counts in self._batches(trainer):
            prepared = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            value = float(loss(trainer.strategy.batch_to_device(prepared)))
            if counts:
                losses.append(value)
        everywhere = [value for part in gather_objects(losses) for value in part]
        return -sum(everywhere) / len(everywhere)

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Read the batches and look for the method.

        Raises:
            ValueError: There are none, or there is none.
        """
        self._loss_of(module)
        self._batches(trainer)

    def _batches(self, trainer: Trainer) -> list[tuple[Any, bool]]:
        if not self._kept:
            with isolated_rng(seed=0):  # a shuffled loader gives the same batches in a resumed run
                self._kept = self._read(trainer) if self.batches is None else self._deal(self.batches)
        return self._kept

    def _loss_of(self, module: LightningModule) -> Callable[[Any], Tensor]:
        if not isinstance(self.loss, str):
            return partial(self.loss, module)
        method = getattr(module, self.loss, None)
        if not callable(method):
            raise ValueError(
                f"loss: {type(module).__name__} has no method {self.loss!r}. Name a method that takes a batch and "
                "returns a scalar loss, or pass a function of module and batch."
            )
        return cast("Callable[[Any], Tensor]", method)

    def _deal(self, batches: Iterable[Any]) -> list[tuple[Any, bool]]:
        first = list(islice(batches, self.num_batches))
        if not first:
            raise ValueError("batches: expected at least one held-out batch, got none.")
        own = first[rank() :: world_size()]
        num_rounds = math.ceil(len(first) / world_size())
        idle = first[: num_rounds - len(own)]  # scored only to keep pace with the other processes
        return [(batch, True) for batch in own] + [(batch, False) for batch in idle]

    def _read(self, trainer: Trainer) -> list[tuple[Any, bool]]:
        if trainer.val_dataloaders is None:  # not set up yet when validation is rare
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loaders = trainer.val_dataloaders
        if isinstance(loaders, Sequence) and len(loaders) == 1:
            loaders = loaders[0]
        if loaders is None or isinstance(loaders, Sequence | Mapping):
            found = 0 if loaders is None else len(loaders)
            raise ValueError(
                "batches: expected held-out batches, or one validation loader in the trainer to take them from; got "
                f"neither, the number of validation loaders is {found}. Pass the batches."
            )
        own = list(islice(loaders, math.ceil(self.num_batches / world_size())))
        num_common = min(gather_objects(len(own)))
        if num_common == 0:
            raise ValueError("batches: expected at least one validation batch per process, got none.")
        return [(batch, True) for batch in own[:num_common]]
