"""`StartValidation`: where training starts from is measured, and no validation is lost at a resume.

Lightning writes a step's checkpoint before the validation of the same step, and on resume takes that validation for
done.
"""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


def is_validation_due(
    *, num_batches: int, num_batches_in_epoch: int, epoch: int, interval: float, every_n_epochs: int | None
) -> bool:
    """Whether Lightning validates after this batch.

    Args:
        num_batches: Training batches done since the start.
        num_batches_in_epoch: Training batches done in the current epoch.
        epoch: 0-based number of the current epoch.
        interval: Batches between validations (`inf`: none inside an epoch).
        every_n_epochs: Validate in every n-th epoch only; None counts batches over epochs.
    """
    if every_n_epochs is None:
        return num_batches > 0 and num_batches % interval == 0
    return num_batches_in_epoch > 0 and (epoch + 1) % every_n_epochs == 0 and num_batches_in_epoch % interval == 0


def _training_progress(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress  # typed too narrowly there: it does count processed batches


def has_resumed_after_a_pass(trainer: Trainer) -> bool:
    """Whether, at the start of training, Lightning has just closed the pass whose last step the checkpoint holds."""
    passes = trainer.fit_loop.epoch_progress.current
    is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return is_last and 0 < passes.completed == passes.processed  # type: ignore[attr-defined]


class StartValidation(Callback):
    """Validates before the first step; in a resumed fit, runs the validation that the checkpoint still had ahead of it.

    Works in any Lightning project.

    Args:
        before_training: Validate the untrained weights. A resume makes up for a lost validation in any case.
    """

    def __init__(self, before_training: bool = True) -> None:
        self.before_training = before_training
        self.validated_after = -1  # training batches done at the last finished validation
        self._max_steps: int | None = None  # of the loop, while it is set aside

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.validated_after = _training_progress(trainer).total.processed

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A loop that has reached its last step returns before any hook; one step more lets it come to `on_train_start`.
        loop = trainer.fit_loop.epoch_loop
        if trainer.state.fn == "fit" and 0 < loop.max_steps <= checkpoint["global_step"]:
            self._max_steps, loop.max_steps = loop.max_steps, checkpoint["global_step"] + 1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        progress = _training_progress(trainer)
        num_batches = progress.total.processed
        if num_batches == self.validated_after or not trainer.enable_validation:
            return
        passes = trainer.fit_loop.epoch_progress.current
        ended_pass = int(has_resumed_after_a_pass(trainer))  # the validation still belongs to it
        passes.completed -= ended_pass
        is_due = is_validation_due(
            num_batches=num_batches,
            num_batches_in_epoch=progress.current.processed,
            epoch=trainer.current_epoch,
            interval=trainer.val_check_batch or float("inf"),
            every_n_epochs=trainer.check_val_every_n_epoch,
        )
        if is_due or (num_batches == 0 and self.before_training):
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False
            trainer.validating = True
            val_loop.run()
            trainer.training = True
        passes.completed += ended_pass

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validated_after": self.validated_after}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_after = state_dict["validated_after"]
