"""`ProjectedGradients`: from some step on, weights move only in the directions in which they moved before."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from opd_lightning.geometry import decompose, projected


class ProjectedGradients(Callback):
    """Projects the gradient of every chosen matrix onto the k leading right singular directions of its early update.

    After `after_steps` optimiser steps the update W - W_0 of each matrix is decomposed once; from then on its gradient
    g becomes g V V^T just before the optimiser sees it, after `OPDModule`'s clipping and before the trainer's. Where
    early directions are those that training keeps, as arXiv 2606.07082 finds for on-policy distillation (V from some
    20 % of training, k = 16), this costs little; imitation of fixed answers suffers. Adam scales single entries, so its
    steps do not lie in the span exactly. Works in any Lightning project that holds whole weights in each process.

    Memory: a copy of the chosen weights on the CPU (and in checkpoints) up to that step, k directions of each from then
    on. A run goes on with the directions of its first part: resumed, and fitted on by the same trainer.

    Args:
        after_steps: Optimiser steps before.
        k: Directions kept of each matrix.
        matrices: A regular expression that is searched in the names of the weights with two axes that are trained when
            fit starts.

    Raises:
        ValueError: A setting is out of range; when fit starts also when nothing is chosen, weights are cut up, or the
            run has made steps that this callback has not seen.
    """

    def __init__(self, after_steps: int = 12, k: int = 16, matrices: str = r"attn|attention|mlp|ffn|lora_") -> None:
        for name, value in (("after_steps", after_steps), ("k", k)):
            if value < 1:
                raise ValueError(f"ProjectedGradients.{name}: expected at least 1, got {value}.")
        try:
            self._chosen = re.compile(matrices)
        except re.error as error:
            raise ValueError(
                f"ProjectedGradients.matrices: expected a regular expression, got {matrices!r} ({error})."
            ) from error
        self.after_steps, self.k, self.matrices = after_steps, k, matrices
        self._start: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        self._is_resumed = False
        self._fitted: weakref.ref[LightningModule] | None = None  # whose directions these are

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = dict(self._weights(pl_module))
        if not weights:
            raise ValueError(
                f"ProjectedGradients.matrices: {self.matrices!r} is found in no name of a trained matrix. Choose"
                " another expression."
            )
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ValueError("ProjectedGradients: weights are cut up here. Use a single device or ddp.")
        is_same = self._fitted is not None and self._fitted() is pl_module
        if self._is_resumed or (is_same and trainer.global_step > 0):
            self._check_names(weights)
        else:
            self._start = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
            self._bases, self._fitted = {}, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0 and not self._is_resumed and self._fitted is None:
            raise ValueError(
                f"ProjectedGradients: the run has made {trainer.global_step} steps without it, so where its weights"
                " began is not known. Start a new run, resume from a checkpoint that was written with it, or leave it"
                " out."
            )
        self._is_resumed, self._fitted = False, weakref.ref(pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step < self.after_steps:
            return
        known = self._bases or self._start  # as when fit started: another optimiser's turn may switch gradients off
        weights = {name: weight for name, weight in pl_module.named_parameters() if name in known}
        if not self._bases:
            for name, weight in weights.items():
                change = weight.detach().double() - self._start[name].to(weight.device).double()
                self._bases[name] = decompose(change, self.k).right.to(weight.dtype).cpu()
            self._start = {}
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.copy_(projected(weight.grad, self._bases[name].to(weight.grad)))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "bases": self._bases}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start, self._bases = dict(state_dict["start"]), dict(state_dict["bases"])
        self._is_resumed = True

    def _check_names(self, weights: Mapping[str, Tensor]) -> None:
        known = self._bases or self._start
        if known.keys() != weights.keys():
            (name, *_) = sorted(known.keys() ^ weights.keys())
            raise ValueError(
                f"ProjectedGradients.matrices: {self.matrices!r} chooses other weights than when the run began"
                f" ({name!r}, for example). Set what the run began with, or leave ProjectedGradients out."
            )

    def _weights(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        for name, weight in module.named_parameters():
            if weight.requires_grad and weight.ndim == 2 and self._chosen.search(name):
                yield name, weight
