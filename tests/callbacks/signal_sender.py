"""For the runs that test_stop_signals.py starts: a callback that sends its own process a signal in some step."""

import os
import signal
import threading

from lightning.pytorch.callbacks import Callback


class SendSignal(Callback):
    """The signal comes inside the step, or inside the validation after it; to one rank, or to all (-1).

    Instead of a signal it may be an exception, or an absence of 20 seconds.
    """

    def __init__(self, name: str, step: int, rank: int = -1, in_validation: bool = False):
        self.name, self.step, self.rank, self.in_validation = name, step, rank, in_validation

    def _send(self, trainer):
        if self.rank not in (-1, trainer.global_rank):
            return
        if self.name == "exception":
            raise RuntimeError("this rank is broken")
        if self.name == "absence":  # the other rank gives up meanwhile; this one then finds nobody there
            threading.Event().wait(20)
            return
        os.kill(os.getpid(), getattr(signal, self.name))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.step == self.step and not self.in_validation:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.step and batch_idx == 0 and self.in_validation:
            self._send(trainer)
