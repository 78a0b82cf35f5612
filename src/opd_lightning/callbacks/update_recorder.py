"""`UpdateRecorder`: how weight matrices move, at a few steps, without checkpoints; `opd-lightning analyze` reads it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.training.output_paths import check_folder
from opd_lightning.training.run_points import START_FOLDER
from opd_lightning.training.stored_tensors import StoredTensors, tensors_of_folder

_FILE_BYTES = 2**28  # weights are collected up to this size before they are written
_FACTOR_B = re.compile(r"\.lora_B(?:\.(\w+))?(?:\.weight)?$")


class UpdateRecorder(Callback):
    r"""Writes W - W_0 of chosen matrices as safetensors: after steps 1, 2, 4, 8, ... and the last, or as told.

    The update itself is rounded to bfloat16 (to 3 digits), which weights cannot be: most updates are smaller than the
    rounding of the weight. LoRA factors are written as they are. Works in any Lightning project, also with DDP and
    FSDP2.

    Cost on the disk: W_0 once in its own dtype, then 2 bytes per recorded weight and step; at most `max_records` steps.
    In memory: 256 MiB, or one matrix if that is larger; no copy of the model. Stand it behind callbacks that change
    weights after a step (EffOPD), so that it sees what they did, and before those that put averaged weights in place
    when training ends (`WeightAveraging`), so that the last record is of the same weights as the others.

    A record is there whole or not at all. A resumed run goes on in the folder of the first one, whose W_0 it needs.

    Args:
        every_n_steps: Record after every so many optimiser steps; None for powers of two.
        matrices: A regular expression that is searched in the names of weights with two axes that are trained when the
            run begins. By default the attention and MLP matrices of all layers; ``layers\.(0|13|27)\.`` keeps three
            layers of them.
        dirpath: Folder for the records; None is `updates` beside the logs of the run.
        dtype: Of the recorded updates.
        max_records: After so many steps nothing more is recorded, but for the last step.

    Raises:
        ValueError: A setting is out of its range; when fit starts also when nothing is chosen, the folder holds another
            run's records, those of the resumed run are gone, `WeightAveraging` stands before it, or FSDP1 or DeepSpeed
            keep the weights in other shapes.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        matrices: str = r"attn|attention|mlp|feed_forward|ffn|lora_",
        dirpath: str | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        max_records: int = 64,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("max_records", max_records)):
            if value is not None and value < 1:
                raise ValueError(f"UpdateRecorder.{name}: expected at least 1, got {value}.")
        try:
            self._chosen = re.compile(matrices)
        except re.error as error:
            raise ValueError(
                f"UpdateRecorder.matrices: expected a regular expression, got {matrices!r} ({error})."
            ) from error
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"UpdateRecorder.dtype: expected bfloat16 or float32, got {dtype!r}.")
        self.every_n_steps = every_n_steps
        self.matrices = matrices
        self.dirpath = dirpath
        self.dtype = dtype
        self.max_records = max_records
        self.folder: Path | None = None
        self.recorded: list[int] = []
        self._start: StoredTensors | None = None
        self._names: set[str] | None = None  # of the weights in it, once it is there

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, WeightAveraging) for each in callbacks[: callbacks.index(self)]):
            raise ValueError(
                "UpdateRecorder: WeightAveraging puts averaged weights in place when training ends, and stands before"
                " it, so that the last record would be of those. Name UpdateRecorder first in trainer.callbacks."
            )
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"UpdateRecorder: {type(trainer.strategy).__name__} keeps flat or master copies of the weights, of"
                " which no matrix can be read. Use a single device, DDP, or FSDP2 (ModelParallelStrategy)."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = None
        named = list(self._named(pl_module))
        if not named:
            some = [name for name, weight in pl_module.named_parameters() if weight.requires_grad and weight.ndim == 2]
            raise ValueError(
                f"UpdateRecorder.matrices: {self.matrices!r} is found in no name of a trained weight with two axes;"
                f" they are like {', '.join(some[:3]) or 'none'}."
            )
        folder = self._folder_of(trainer)
        has_start, is_empty = trainer.strategy.broadcast(
            ((folder / START_FOLDER).is_dir(), not folder.is_dir() or not any(folder.iterdir()))
        )
        if trainer.global_step == 0:
            self._begin(trainer, pl_module, folder, is_empty=is_empty)
        elif not has_start:
            raise ValueError(
                f"UpdateRecorder.dirpath: a resumed run is recorded from its first weights, and they are not in"
                f" {str(folder / START_FOLDER)!r}. Set dirpath to the folder of the earlier records, or leave"
                " UpdateRecorder out."
            )
        self.folder = folder
        self._start = tensors_of_folder(folder / START_FOLDER) if trainer.is_global_zero else None
        self._names = set(trainer.strategy.broadcast([] if self._start is None else sorted(self._start.shapes)))
        self.recorded = [step for step in self.recorded if step <= trainer.global_step]
        named = list(self._named(pl_module))
        size = sum(_record_bytes(name, weight, self._dtype) for name, weight in named)
        say(trainer, f"UpdateRecorder: {len(named)} weights, {size / 2**20:.3g} MiB per record, in {folder}")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._is_due(step) and (not self.recorded or step > self.recorded[-1]):
            if len(self.recorded) < self.max_records:
                self._record(trainer, pl_module, step)
            elif len(self.recorded) == self.max_records:
                rank_zero_warn(
                    f"UpdateRecorder.max_records: {self.max_records} steps are recorded; from here on only the last"
                    " one is. Set every_n_steps higher to spread them."
                )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > (self.recorded[-1] if self.recorded else 0):
            self._record(trainer, pl_module, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"folder": None if self.folder is None else str(self.folder), "recorded": list(self.recorded)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.folder = None if state_dict["folder"] is None else Path(state_dict["folder"])
        self.recorded = list(state_dict["recorded"])

    def _is_due(self, step: int) -> bool:
        if self.every_n_steps is None:
            return step > 0 and step & (step - 1) == 0
        return step > 0 and step % self.every_n_steps == 0

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def _named(self, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
        for name, weight in module.named_parameters():
            is_wanted = weight.requires_grad if self._names is None else name in self._names
            if is_wanted and weight.ndim == 2 and self._chosen.search(name):
                yield name, weight

    def _folder_of(self, trainer: Trainer) -> Path:
        """The folder of the records, the same on every process."""
        if self.dirpath is not None:
            return Path(self.dirpath)
        if trainer.global_step > 0 and self.folder is not None:
            return self.folder
        logger = trainer.loggers[0] if trainer.loggers else None
        place = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir
        return Path(trainer.strategy.broadcast(str(Path(place, "updates"))))

    def _begin(self, trainer: Trainer, module: LightningModule, folder: Path, *, is_empty: bool) -> None:
        check_folder("UpdateRecorder.dirpath", folder)
        if not is_empty:
            raise ValueError(
                f"UpdateRecorder.dirpath: {str(folder)!r} is not empty, and records of two runs cannot be told apart."
                " Choose another folder, or remove it."
            )
        self.recorded = []
        weights = ((name, _whole(weight)) for name, weight in self._named(module))
        _write(folder / START_FOLDER, _scaled(weights, module), is_writer=trainer.is_global_zero)

    def _record(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert self.folder is not None
        target = self.folder / f"step={step:06d}"
        _write(target, self._updates(module), is_writer=trainer.is_global_zero)
        self.recorded.append(step)

    def _updates(self, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
        for name, weight in _scaled(((name, _whole(weight)) for name, weight in self._named(module)), module):
            if "lora_" in name or self._start is None:  # the others only take part in gathering
                yield name, weight
            else:
                before = self._start.read(name).to(torch.promote_types(weight.dtype, torch.float32))
                yield name, (weight.to("cpu", before.dtype) - before).to(self._dtype)


def _whole(weight: Tensor) -> Tensor:
    """The full tensor; a collective call where it is sharded."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _scaled(weights: Iterator[tuple[str, Tensor]], module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Multiply LoRA's B with its scale (alpha / r), which stands in the layer and not among the weights."""
    for name, weight in weights:
        if match := _FACTOR_B.search(name):
            layer: Any = module.get_submodule(name[: match.start()])
            weight = weight * float(layer.scaling[match[1]])
        yield name, weight


def _record_bytes(name: str, weight: Tensor, dtype: torch.dtype) -> int:
    return weight.numel() * (weight.element_size() if "lora_" in name else dtype.itemsize)


def _write(target: Path, weights: Iterator[tuple[str, Tensor]], *, is_writer: bool) -> None:
    """Write a folder of safetensors under another name, and give it its own once it is whole."""
    part = target.with_name(f"{target.name}.part")
    if is_writer:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    collected: dict[str, Tensor] = {}
    size = number = 0
    for name, weight in weights:
        if is_writer:
            collected[name] = weight.to("cpu", copy=True).contiguous()
            size += collected[name].nbytes
        if size >= _FILE_BYTES:
            save_file(collected, part / f"updates-{number:05d}.safetensors")
            collected, size, number = {}, 0, number + 1
    if is_writer:
        if collected:
            save_file(collected, part / f"updates-{number:05d}.safetensors")
        shutil.rmtree(target, ignore_errors=True)  # of a run that was ended and did this step again
        os.replace(part, target)
