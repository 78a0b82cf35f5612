"""`StepProgressBar`: how far a run is, counted in steps. Works in any Lightning project."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import rich
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typing_extensions import override

from opd_lightning.callbacks.console import say

SPEED_STEPS = 10  # steps over which the tokens per second are taken
LEFT_SECONDS = 3600.0  # past steps from which the time left is told; the bar's own 30 s may not hold a single one


class _BarAndMetrics(Progress):
    """Bars, and on lines below them, cut to the width of the screen, the latest metrics and the last search."""

    metrics = ""
    search = ""

    @override
    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in (self.metrics, self.search):
            if line:
                yield Text(line, style="italic", no_wrap=True, overflow="ellipsis")


class StepProgressBar(ProgressBar):
    """One bar that counts optimiser steps up to `max_steps`, with the metrics of the progress bar on a line below.

    That line ends with the response tokens trained on per second, over the last steps and all processes, where batches
    count them (`num_response_tokens`); searches are in it, validations are not. A line below it says what the last
    search of `EffOPD` or `LearningRateLineSearch` came to. A second bar shows a validation while it lasts. What is
    printed or logged meanwhile appears above. Where the output is no terminal, a line is printed every so many steps
    and after each validation instead.

    Args:
        plain_every_n_steps: Steps between two lines when the output is a file or a pipe.

    Raises:
        ValueError: The number is below 1.
    """

    def __init__(self, plain_every_n_steps: int = 10) -> None:
        super().__init__()
        if plain_every_n_steps < 1:
            raise ValueError(
                f"StepProgressBar.plain_every_n_steps: expected an integer of at least 1, got {plain_every_n_steps}."
            )
        self.plain_every_n_steps = plain_every_n_steps
        self.progress: _BarAndMetrics | None = None
        self._is_enabled = True
        self._steps: TaskID | None = None
        self._batches: TaskID | None = None
        self._speeds: deque[tuple[float, float]] = deque(maxlen=SPEED_STEPS)  # (tokens, seconds) of the last steps
        self._since: float | None = None  # when the step under way began

    @override
    def disable(self) -> None:
        self._is_enabled = False

    @override
    def enable(self) -> None:
        self._is_enabled = True

    @override
    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        say(self.trainer, sep.join(map(str, args)))

    # ------------------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_steps(trainer)
        self._speeds.clear()
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, num_tokens = time.perf_counter(), getattr(batch, "num_response_tokens", None)
        if self._since is not None and num_tokens is not None:
            self._speeds.append((num_tokens * trainer.world_size, now - self._since))
        self._since = now
        self._update(trainer, pl_module, is_due=trainer.global_step % self.plain_every_n_steps == 0)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_batches()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn != "fit":
            self._stop()
        elif not trainer.sanity_checking:
            self._since = time.perf_counter()
            self._update(trainer, pl_module, is_due=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    # ----------------------------------------------------------------------------- validation, test, predict: batches

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin_batches(trainer, self.validation_description, self.total_val_batches_current_dataloader)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin_batches(trainer, self.test_description, self.total_test_batches_current_dataloader)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            self._begin_batches(trainer, self.predict_description, self.total_predict_batches_current_dataloader)

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self.progress is not None and self._batches is not None:
            self.progress.advance(self._batches)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    on_predict_end = on_test_end

    # ---------------------------------------------------------------------------------------------------------- ends

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    # ------------------------------------------------------------------------------------------------------ internals

    def _start(self) -> None:
        if self.progress is not None or not self._is_enabled:
            return
        rich.reconfigure()  # the screen may be another one than when the console was made
        console = rich.get_console()
        self._started = time.perf_counter()
        before = sys.stderr
        self.progress = _BarAndMetrics(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            speed_estimate_period=LEFT_SECONDS,
        )
        self.progress.start()
        self._logs = [handler for handler in _log_handlers() if handler.stream is before]
        for handler in self._logs:  # they hold on to the stream that they were given
            handler.setStream(sys.stderr)

    def _stop(self) -> None:
        if self.progress is None:
            return
        self._end_batches()
        self.progress.stop()
        for handler in self._logs:
            handler.setStream(sys.stderr)
        self.progress, self._steps = None, None
        self.reset_dataloader_idx_tracker()

    def _show_steps(self, trainer: Trainer) -> None:
        self._start()
        if self.progress is not None and self._steps is None:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._steps = self.progress.add_task("Step", total=total, completed=trainer.global_step)

    def _update(self, trainer: Trainer, pl_module: LightningModule, *, is_due: bool) -> None:
        if self.progress is None or self._steps is None:
            return
        values = self.get_metrics(trainer, pl_module)
        values.pop("v_num", None)
        parts = [f"{name.removeprefix('train/')} {_short(value)}" for name, value in values.items()]
        if (seconds := sum(seconds for _, seconds in self._speeds)) > 0:
            parts.append(f"{_rounded(sum(tokens for tokens, _ in self._speeds) / seconds)} tokens/s")
        self.progress.metrics = "  ".join(parts)
        self.progress.search = last_search(trainer)
        self.progress.update(self._steps, completed=trainer.global_step)
        if is_due and self.progress.disable:
            total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            seconds = time.perf_counter() - self._started
            say(trainer, f"step {trainer.global_step}{total}  {seconds:.0f} s  {self.progress.metrics}")

    def _begin_batches(self, trainer: Trainer, description: str, total: float) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show_steps(trainer)
        self._start()
        self._end_batches()
        if self.progress is not None:
            self._batches = self.progress.add_task(description, total=total if total < float("inf") else None)

    def _end_batches(self) -> None:
        if self.progress is not None and self._batches is not None:
            self.progress.remove_task(self._batches)
        self._batches = None


def with_progress_bar(callbacks: Callback | list[Callback] | None, *, is_wanted: bool | None) -> list[Callback]:
    """The callbacks, and a `StepProgressBar` unless there is a bar already or none is wanted (None: it is)."""
    chosen = list(callbacks) if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
    if is_wanted is False or any(isinstance(callback, ProgressBar) for callback in chosen):
        return chosen
    return [*chosen, StepProgressBar()]


def last_search(trainer: Trainer) -> str:
    """What the last search of the run came to, in a few words; empty without any."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    reports = [report for each in callbacks if (report := getattr(each, "last_search", None)) is not None]
    return max(reports, key=lambda report: report.step).outcome() if reports else ""


def _rounded(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.3g}"


def _log_handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler):  # else: looked up each time
                yield handler
