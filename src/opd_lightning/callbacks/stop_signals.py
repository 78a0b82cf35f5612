"""`StopSignals`: a signal is a wish to stop, noted when it comes and granted where all processes can stop together."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from lightning import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from typing_extensions import override

from opd_lightning.distributed import largest
from opd_lightning.training.usable_weights import last_checkpoint

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class StopSignals(_SignalConnector):
    """Takes the place of Lightning's own, which waits for the other processes inside the handler, some for ever.

    `received_sigterm` is what Lightning's loops look at. One process sets it at once. Several that train set it only in
    `agree`, which all of them call after the same step: a signal to any one of them stops all, and none alone. Ctrl-C
    interrupts one process where it is, and is noted like the others by several. A signal that the process was told to
    ignore (`nohup`) stays ignored.

    Args:
        trainer: Whose handlers these are.
        patience: Seconds that one of several processes waits without a sign of progress, once it is to stop.
    """

    def __init__(self, trainer: Trainer, patience: float) -> None:
        super().__init__(trainer)
        self.patience = patience
        self.noted = 0  # the signal's number; 0: none came
        self._deadline: threading.Timer | None = None

    @property
    def status(self) -> int:
        """Exit status of a process that this signal ends, as shells give it."""
        return 128 + (self.noted or signal.SIGTERM)

    @override
    def register_signal_handlers(self) -> None:
        self.noted = 0
        super().register_signal_handlers()
        signals = [*SIGNALS, signal.SIGINT] if self.trainer.world_size > 1 else SIGNALS
        for signum in signals:
            was = self._original_handlers.get(signum)
            if was is signal.SIG_IGN:
                self._register_signal(signum, signal.SIG_IGN)
            elif signum != signal.SIGTERM:  # that one is registered above, with what SLURM and others want of it
                self._register_signal(signum, self._sigterm_notifier_fn)

    @override
    def _sigterm_notifier_fn(self, signum: int | signal.Signals, _: FrameType | None) -> None:
        if self.noted:
            return
        self.noted = int(signum)
        trainer = self.trainer
        if trainer.world_size == 1 or trainer.state.fn != "fit":
            self.received_sigterm = True
        if trainer.state.fn != "fit" and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)  # evaluation has no common step: each process stops by itself
        self.wait_no_longer()

    def agree(self) -> None:
        """Called by all processes after the same step: if a signal has come to any of them, all are to stop."""
        if self.trainer.world_size > 1:
            self.noted = largest(self.noted, self.trainer.strategy.root_device)
            self.received_sigterm = self.noted > 0
        self.progress()

    def progress(self) -> None:
        """The process is alive: what is left of its time to stop starts anew."""
        if self.noted:
            self.wait_no_longer()

    def wait_no_longer(self) -> None:
        """From now on this process, if it is one of several, ends after `patience` seconds without progress."""
        self._forget_deadline()
        if self.trainer.world_size > 1:
            self._deadline = threading.Timer(self.patience, self._give_up)
            self._deadline.daemon = True
            self._deadline.start()

    def _give_up(self) -> None:
        # the main thread may be inside a collective that nothing interrupts, so an exception would not do
        print(
            f"rank {self.trainer.global_rank}: was to stop and waited {self.patience:g} s for the other processes; no"
            f" rescue is saved. {last_checkpoint(self.trainer)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(self.status if self.noted else 1)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    @override
    def teardown(self) -> None:
        self._forget_deadline()
        super().teardown()
