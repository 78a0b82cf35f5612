"""`LiveReport`: the page of `opd-lightning report`, written while the run goes. Works in any Lightning project."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from opd_lightning.reports.plots import figure_of
from opd_lightning.reports.token_view import token_fragment
from opd_lightning.reports.training_runs.folder import Run, find_tokens, read_run
from opd_lightning.reports.training_runs.page import write_report
from opd_lightning.reports.training_runs.searches import search_panels, searches_of

MOST_OF_TIME = 0.01
SECONDS = {"s": 1, "m": 60, "h": 3600}


class LiveReport(Callback):
    """Writes `report/report.html` and `report/report.json` in the run's folder every so often, and once at the end.

    Until the run ends the page loads itself anew as often as it is written. The first process writes it, from the
    `metrics.csv` of the run's `CSVLogger`, after the first step and then at most every `every`; when writing takes long
    (a second or two with matplotlib) it is done less often, so that it stays below one percent of the time after the
    first page and before the last. The last one has the token view too, of what `TokenRecorder` wrote until then: all
    of it when that callback stands before this one. Files that cannot be read or written are a warning, and so is what
    cannot be drawn; the run goes on.

    A `TensorBoardLogger` gets every search of EffOPD and of `LearningRateLineSearch` as a figure, if matplotlib is
    installed; its curves are there in any case.

    Args:
        every: Least time between two pages: a number with s, m or h.

    Raises:
        ValueError: `every` is no such time; at the start of fit, when the trainer has no `CSVLogger`.
    """

    def __init__(self, every: str = "5m") -> None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", every)
        if match is None or not float(match[1]) > 0:
            raise ValueError(f"LiveReport.every: expected a time such as 30s, 5m or 1h, got {every!r}.")
        self.every = every
        self._pause = float(match[1]) * SECONDS[match[2]]
        self._due = -math.inf
        self._figures_from = 0
        self._first_step = 0
        self._last_cost = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and _csv_logger(trainer) is None:
            raise ValueError(
                "LiveReport: it reads the metrics.csv of a CSVLogger, and the trainer has none. Add one to"
                " trainer.logger, or leave LiveReport out."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due, self._figures_from, self._first_step = -math.inf, trainer.global_step, trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # the metrics of a step are logged after the hooks at its end, so that they are there when the next one starts
        if trainer.global_step > self._first_step and time.monotonic() >= self._due:
            self._write(trainer, is_over=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, is_over=True)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer, is_over=True)

    def _write(self, trainer: Trainer, *, is_over: bool) -> None:
        logger = _csv_logger(trainer)
        if not trainer.is_global_zero or logger is None:
            return
        folder, started = Path(logger.log_dir), time.monotonic()
        try:
            logger.save()
            run = read_run(folder, str(folder))
            pause = max(self._pause, self._last_cost / MOST_OF_TIME)
            # reading all records takes seconds, so pages on the way do without
            tokens = find_tokens(folder) if is_over else None
            fragment = None if tokens is None else token_fragment([tokens], labels=[str(folder)])
            write_report(
                folder / "report",
                [run],
                refresh_seconds=None if is_over else math.ceil(pause),
                fragments=[] if fragment is None else [fragment],
            )
            self._log_figures(trainer, run)
        except (OSError, ValueError, RuntimeError) as error:  # the last: matplotlib's
            rank_zero_warn(f"LiveReport: the page could not be written ({error}); the run goes on.")
        self._last_cost = time.monotonic() - started
        self._due = time.monotonic() + max(self._pause, self._last_cost / MOST_OF_TIME)

    def _log_figures(self, trainer: Trainer, run: Run) -> None:
        """Give searches since the last page to loggers that take figures; known by their methods."""
        experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        takers: list[Any] = [each for each in experiments if hasattr(each, "add_figure")]
        new = [each for each in searches_of(run) if each.step > self._figures_from]
        for search in new if takers else ():
            for panel in search_panels([search]):
                figure = figure_of(panel)
                for taker in takers if figure is not None else ():
                    taker.add_figure(f"{search.who}/search", figure, search.step)
        self._figures_from = max((each.step for each in new), default=self._figures_from)


def _csv_logger(trainer: Trainer) -> CSVLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
