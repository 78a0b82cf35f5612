"""`RescueCheckpoint`: save what has been trained when a run is stopped or fails.

Works in any Lightning project. A rescue is exact where randomness is a function of the step, as here: the step that was
under way is simply done again.
"""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.callbacks.start_validation import has_resumed_after_a_pass
from opd_lightning.callbacks.stop_signals import StopSignals
from opd_lightning.distributed import OutOfReach, alone
from opd_lightning.interfaces.addresses import without_secrets
from opd_lightning.training.usable_weights import diverged_weight, last_checkpoint, way_back


class RescueCheckpoint(Callback):
    """Saves `rescue.ckpt` on SIGTERM, SIGHUP, Ctrl-C and on any exception during `fit`, validations included.

    It lies beside the other checkpoints and resumes as if nothing had happened: the training loop in it is as it was at
    the end of the last complete step. What cannot be exact is not saved, and said: a step or an EffOPD search that has
    changed the weights in part, and a validation of averaged weights. Weights that have diverged are not saved either.

    A process that a signal ends has the exit status 128 plus the signal's number (143 for SIGTERM). Several processes
    agree after each step whether one of them was sent a signal, and then save and stop together. An exception may leave
    the others anywhere, so each process that meets one saves without them: under DDP it has the whole state. Where it
    has not (rollouts generated ahead, strategies that shard), that is said, and nothing saved.

    Args:
        filename: Name of the file, without extension.
        patience: Seconds that one of several processes waits for the others without progress, once it is to stop;
            then it ends with a message. Longer than a step, a batch of the validation and a save take.
    """

    def __init__(self, filename: str = "rescue", patience: float = 600.0) -> None:
        if not patience > 0:
            raise ValueError(f"RescueCheckpoint.patience: expected a positive number of seconds, got {patience}.")
        self.filename = filename
        self.patience = patience
        self.is_between_steps = True
        self.has_gradients = False  # of the whole step under way: its optimiser may have begun
        self.loop_after_step: dict[str, Any] | None = None  # of the training loop, at the end of the last step
        self._is_saving = self._is_set_up = False
        self._folder: str | Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.loop_after_step, self.is_between_steps = None, True
        if not isinstance(trainer._signal_connector, StopSignals):  # the command adds one to that of the user
            trainer._signal_connector = StopSignals(trainer, self.patience)
        self.signals = trainer._signal_connector
        self._is_set_up = True

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loop_after_step = checkpoint.get("loops", {}).get("fit_loop")  # until there is a step of our own

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if has_resumed_after_a_pass(trainer):  # Lightning takes the next pass for started, and would not count it
            trainer.fit_loop.reset_restart_stage()
        self._folder = trainer.log_dir or trainer.default_root_dir  # the processes agree on it, which may be too late

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.version_before_step = getattr(pl_module, "weight_version", None)
        self.is_between_steps = self.has_gradients = False

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.has_gradients = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.is_between_steps = True
        if not trainer.fit_loop._should_accumulate():  # gradients of part of a step are in no checkpoint
            self.loop_after_step = trainer.fit_loop.state_dict()
        self.signals.agree()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning looks after a batch, unless it is the last one, of which the processes may have different numbers
        if trainer.state.fn == "fit" and trainer.received_sigterm:
            raise SIGTERMException

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.signals.progress()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_saving and self.loop_after_step is not None:
            checkpoint["loops"]["fit_loop"] = self.loop_after_step
            checkpoint["epoch"] = self.loop_after_step["epoch_progress"]["current"]["completed"]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for timer in trainer_callbacks(trainer):
            if isinstance(timer, Timer) and timer.start_time() is None and (timer.time_remaining() or 1) <= 0:
                used = timedelta(seconds=int(timer.time_elapsed()))
                say(
                    trainer,
                    f"Nothing was trained: the checkpoint's run took {used}, and trainer.max_time is used up. Resume"
                    " with a longer one (it counts from the start of the first run).",
                )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._is_set_up:  # a mistake was found before: there is nothing to rescue
            return
        if isinstance(exception, SIGTERMException):
            # Lightning's launcher kills the first process, with the status, when one that it started ends with another
            exception.code = self.signals.status if trainer.local_rank == 0 else 0
        elif trainer.world_size > 1:
            self.signals.wait_no_longer()
            self._tell(trainer, exception, f"stopped by {type(exception).__name__}: {exception}")
        self._rescue(trainer, pl_module, exception)

    def _rescue(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or trainer.global_step == 0:
            return
        name = self._reason(exception)
        if reason := self._inexactness(trainer, pl_module):
            text = f"Stopped by {name}; no rescue is saved, since {reason}. {last_checkpoint(trainer)}"
            self._tell(trainer, exception, text)
            return
        can_ask = not _has_others_elsewhere(trainer, exception)
        if (weight := diverged_weight(pl_module, asks_others=can_ask)) is not None:
            reason = f"the weights have diverged ({weight})"
            text = f"Stopped by {name}; no rescue is saved, since {reason}. {way_back(trainer)}"
            self._tell(trainer, exception, text)
            return
        checkpoint = trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None) or self._folder or trainer.default_root_dir
        path = Path(folder) / f"{self.filename}.ckpt"
        self._is_saving = True
        try:
            if _has_others_elsewhere(trainer, exception):
                _save_alone(trainer, path)
            else:
                trainer.save_checkpoint(path, weights_only=False)
                self._log_last_row(trainer)
        except (OSError, OutOfReach) as error:  # a full disk may be why it stops, and must stay the reason reported
            self._tell(trainer, exception, f"No rescue: {error}. {last_checkpoint(trainer)}")
            return
        finally:
            self._is_saving = False
        if isinstance(exception, FloatingPointError):
            step = f"{path} holds step {trainer.global_step}, which fails"
            self._tell(trainer, exception, f"Stopped by {name}; {step}. {way_back(trainer)}")
        else:
            text = f"Stopped by {name} after step {trainer.global_step}; resume with --ckpt_path {path}"
            self._tell(trainer, exception, text)

    def _log_last_row(self, trainer: Trainer) -> None:
        """Log the last step, which Lightning does after all callbacks: one of them may have been interrupted."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if trainer.world_size == 1 and self.is_between_steps and progress.completed < progress.processed:
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()

    def _tell(self, trainer: Trainer, exception: BaseException, text: str) -> None:
        if _has_others_elsewhere(trainer, exception):
            print(f"rank {trainer.global_rank}: {without_secrets(text)}", file=sys.stderr, flush=True)
        else:
            say(trainer, text)

    def _reason(self, exception: BaseException) -> str:
        if isinstance(exception, SIGTERMException) and self.signals.noted:
            return signal.Signals(self.signals.noted).name
        return type(exception).__name__

    def _inexactness(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Why a checkpoint written now would not resume exactly, if it would not."""
        if any(getattr(callback, "has_pending_search", False) for callback in trainer_callbacks(trainer)):
            return "a search was under way"
        if not self.is_between_steps and (
            self.has_gradients or getattr(pl_module, "weight_version", None) != self.version_before_step
        ):
            return "a step had changed the weights in part"
        if trainer.validating and any(isinstance(c, WeightAveraging) for c in trainer_callbacks(trainer)):
            return "averaged weights were in place for the validation"
        return None


def _has_others_elsewhere(trainer: Trainer, exception: BaseException) -> bool:
    """Whether the other processes, if there are any, cannot take part: only after a signal all stop at one place."""
    return trainer.world_size > 1 and not isinstance(exception, SIGTERMException)


def _save_alone(trainer: Trainer, path: Path) -> None:
    """Save what this process has; another may do the same, so each writes a file of its own and then renames it.

    Raises:
        OutOfReach: It has not all of it.
    """
    if not isinstance(trainer.strategy, DDPStrategy):
        raise OutOfReach("part of it lies on the other processes")
    own = path.with_name(f"{path.stem}-rank{trainer.global_rank}.ckpt")
    with alone():
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, own)
    own.replace(path)


def trainer_callbacks(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, under a type that says so."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
