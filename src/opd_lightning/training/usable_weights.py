"""Have the weights diverged, and which checkpoint is the last from before that? Works for any module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from opd_lightning.distributed import gather_objects, is_sharded, local_part
from opd_lightning.interfaces.addresses import without_secrets
from opd_lightning.training.checkpoints import open_checkpoint
from opd_lightning.training.sharded_checkpoints import is_checkpoint


def unusable_weight(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first weight that has diverged: its norm, taken in float32, is not finite. Of shards it sees its own.

    So a NaN, an infinity, and numbers whose squares overflow (above 1.8e19), which no layer survives.
    """
    for name, weight in weights:
        mine = local_part(weight)
        if mine.is_floating_point() and not torch.isfinite(torch.linalg.vector_norm(mine.float())):
            return name
    return None


def diverged_weight(module: nn.Module, *, asks_others: bool = True) -> str | None:
    """Name of a trained weight that has diverged, the same on all processes that hold parts of them.

    Args:
        module: Whose weights.
        asks_others: Whether the others can be asked; without them, parts that they hold are not looked at.
    """
    found = unusable_weight(trained_weights(module))
    everyone = gather_objects(found) if asks_others and is_sharded(module) else [found]
    return next(filter(None, everyone), None)


def check_weights(module: LightningModule) -> None:
    """Refuse to save weights that have diverged; an earlier checkpoint would give way to them.

    Raises:
        FloatingPointError: They have.
    """
    if (name := diverged_weight(module)) is not None:
        raise FloatingPointError(
            f"The weights have diverged ({name} is not finite, or huge), so they are not saved."
            f" {way_back(module.trainer)}"
        )


def trained_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what is trained."""
    return ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)


def last_usable_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of this run from before its current step whose weights have not diverged.

    The weights of the current step are not trusted: no gradient at them may have been finite. Tensors are read from the
    disk one by one, those of the newest file first.
    """
    folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
    found = {path for folder in folders if folder for path in Path(folder).glob("*.ckpt")}
    if trainer.ckpt_path is not None and is_checkpoint(Path(trainer.ckpt_path)):
        found.add(Path(trainer.ckpt_path))
    files = {path.resolve(): path for path in sorted(found, key=Path.is_symlink, reverse=True) if path.exists()}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoint = open_checkpoint(path)
        except ValueError:  # cut short or damaged: an earlier one is looked for
            continue
        is_earlier = checkpoint["global_step"] < trainer.global_step
        if is_earlier and unusable_weight(checkpoint["state_dict"].items()) is None:
            return files[path]
    return None


def last_checkpoint(trainer: Trainer) -> str:
    """Where to resume from when nothing more can be saved, in a sentence; asks no other process."""
    folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
    found = [path for folder in folders if folder for path in Path(folder).glob("*.ckpt") if is_checkpoint(path)]
    if found:
        newest = max(found, key=lambda path: (path.stat().st_mtime, path.is_symlink()))
        return f"Resume from the last checkpoint, {newest}."
    if trainer.ckpt_path is not None:
        return f"This run has saved none yet: resume again from {without_secrets(str(trainer.ckpt_path))}."
    return "There is no checkpoint yet: start again."


def way_back(trainer: Trainer) -> str:
    """What to do after the weights have diverged, in a sentence."""
    path = last_usable_checkpoint(trainer)
    remedy = "with a lower model.optimizer.init_args.lr, in fp32 or bf16-mixed, or with another teacher"
    if path is None:
        return f"No earlier checkpoint has usable weights: start again, {remedy}."
    return (
        f"The last checkpoint with usable weights is {path}: resume from it {remedy}. For another learning rate also"
        " set model.override_optimizer_on_resume: true; otherwise the checkpoint's stays."
    )
