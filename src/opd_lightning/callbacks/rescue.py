"""`RescueCheckpoint`: save what has been trained when a run is stopped or fails.

Knows Lightning only. A rescue is exact because randomness is a function of the step: the step that was under way is
simply done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override


class RescueCheckpoint(Callback):
    """Saves `rescue.ckpt` on SIGTERM, on Ctrl-C and on any exception during `fit`.

    It lies beside the other checkpoints and resumes as if nothing had happened. On several processes only SIGTERM is
    rescued: the ranks agree on that one, while an exception on one of them leaves the others waiting. A step whose
    weights were already partly changed (`updates_per_batch` > 1) is not saved.

    Args:
        filename: Name of the file, without extension.
    """

    def __init__(self, filename: str = "rescue") -> None:
        self.filename = filename
        self.is_between_steps = True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.version_before_step = getattr(pl_module, "weight_version", None)
        self.is_between_steps = False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.is_between_steps = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or not trainer.training or trainer.global_step == 0:
            return
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return
        if not self.is_between_steps and getattr(pl_module, "weight_version", None) != self.version_before_step:
            return
        checkpoint = trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        path = Path(folder) / f"{self.filename}.ckpt"
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:  # a full disk may be the reason to stop, which must stay the one reported
            rank_zero_warn(f"No rescue: {error}")
            return
        rank_zero_warn(
            f"Stopped by {type(exception).__name__} after step {trainer.global_step}; resume with --ckpt_path {path}"
        )
