"""`RescueCheckpoint`: save what has been trained when a run is stopped or fails.

Works in any Lightning project. A rescue is exact where randomness is a function of the step, as here: the step that was
under way is simply done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.training.usable_weights import trained_weights, unusable_weight, way_back


class RescueCheckpoint(Callback):
    """Saves `rescue.ckpt` on SIGTERM, on Ctrl-C and on any exception during `fit`, validations included.

    It lies beside the other checkpoints and resumes as if nothing had happened. What cannot be exact is not saved, and
    said: a step or an EffOPD search that has changed the weights in part, and a validation of averaged weights. Weights
    that have diverged are not saved either. On several processes only SIGTERM is rescued: the ranks agree on that one,
    while an exception on one of them leaves the others waiting.

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
        if trainer.state.fn != "fit" or trainer.global_step == 0:
            return
        name = type(exception).__name__
        if reason := self._inexactness(trainer, pl_module, exception):
            say(trainer, f"Stopped by {name}; no rescue is saved, since {reason}. Resume from the last checkpoint.")
            return
        if (weight := unusable_weight(trained_weights(pl_module))) is not None:
            reason = f"the weights have diverged ({weight})"
            say(trainer, f"Stopped by {name}; no rescue is saved, since {reason}. {way_back(trainer)}")
            return
        checkpoint = trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        path = Path(folder) / f"{self.filename}.ckpt"
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:  # a full disk may be the reason to stop, which must stay the one reported
            say(trainer, f"No rescue: {error}")
            return
        if isinstance(exception, FloatingPointError):
            say(
                trainer, f"Stopped by {name}; {path} holds step {trainer.global_step}, which fails. {way_back(trainer)}"
            )
        else:
            say(trainer, f"Stopped by {name} after step {trainer.global_step}; resume with --ckpt_path {path}")

    def _inexactness(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> str | None:
        """Why a checkpoint written now would not resume exactly, if it would not."""
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return "the other processes cannot take part"
        if any(getattr(callback, "has_pending_search", False) for callback in trainer_callbacks(trainer)):
            return "a search was under way"
        if not self.is_between_steps and getattr(pl_module, "weight_version", None) != self.version_before_step:
            return "a step had changed the weights in part"
        if trainer.validating and any(isinstance(c, WeightAveraging) for c in trainer_callbacks(trainer)):
            return "averaged weights were in place for the validation"
        return None


def trainer_callbacks(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, under a type that says so."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
