"""What is on the screen of a terminal, and in a file, during and after a run."""

import logging
import os
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from screen import Terminal
from toys import make_data, make_module, make_trainer

from opd_lightning import EffOPD
from opd_lightning.callbacks.console import say
from opd_lightning.callbacks.progress import StepProgressBar, last_search, with_progress_bar
from opd_lightning.extrapolation.line_search import Trial
from opd_lightning.extrapolation.rate_search import RateReport
from opd_lightning.extrapolation.report import SearchReport
from opd_lightning.extrapolation.step_length import ScaledStep, StepLength

VALIDATION = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


@contextmanager
def on_a_terminal():
    """Standard output, standard error and Lightning's log go to one terminal of 80 columns."""
    screen = Terminal()
    log, handler = logging.getLogger("lightning.pytorch"), logging.StreamHandler(screen)
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    with (
        patch.dict(os.environ, COLUMNS="80", LINES="40", TERM="xterm"),
        redirect_stdout(screen),
        redirect_stderr(screen),
    ):
        try:
            yield screen
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
    assert handler.stream is screen


class Watch(Callback):
    """Remembers the screen in the middle of a validation, and talks."""

    def __init__(self, terminal=None):
        self.terminal, self.during = terminal, []

    def on_validation_batch_end(self, trainer, pl_module, *_, **__):
        if self.terminal is not None:
            trainer.progress_bar_callback.progress.refresh()
            self.during = self.terminal.lines()

    def on_train_batch_end(self, trainer, *_):
        say(trainer, f"said after step {trainer.global_step}: " + "x" * 60)


def fit(folder, folders, *callbacks, steps=5, **options):
    module = make_module(*folders)
    options = {"enable_progress_bar": True, "callbacks": list(callbacks)} | VALIDATION | options
    trainer = make_trainer(folder, steps, **options)
    trainer.fit(module, make_data())
    return trainer


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def test_a_terminal_keeps_every_line_and_one_bar(tmp_path, folders):
    search = EffOPD(lambda module: 0.0, schedule=[2], candidates=(1.0,))
    with on_a_terminal() as terminal:
        watch = Watch(terminal)
        fit(tmp_path, folders, StepProgressBar(), search, watch)
    lines = terminal.lines()
    said = [line for line in lines if line.startswith("said")]
    assert said == [f"said after step {step}: " + "x" * 60 for step in range(1, 6)]
    assert sum("EffOPD step 2" in line and "tried" in line for line in lines) == 1
    assert sum("max_steps=5` reached" in line for line in lines) == 1
    assert sum(line.startswith("EffOPD: 1 searches") for line in lines) == 1
    (bar,) = [line for line in lines if line.startswith("Step")]
    assert " 5/5 " in bar and len(bar) <= 80
    metrics, search = lines[lines.index(bar) + 1 :][:2]
    assert "reverse_kl" in metrics and "accuracy" in metrics and metrics.endswith(" tokens/s") and len(metrics) <= 80
    assert search == "EffOPD step 2: not moved (all tied), score 0"
    assert not any("Epoch" in line or "Validation" in line for line in lines)
    assert any(line.startswith("Validation") for line in watch.during)


def test_the_time_left_is_told_where_a_step_takes_minutes():
    now = 0.0
    with on_a_terminal():
        bar = StepProgressBar()
        bar._start()
        bar.progress.get_time = lambda: now
        task = bar.progress.add_task("Step", total=10)
        for step in range(1, 4):
            now = 120.0 * step
            bar.progress.update(task, completed=step)
        left = bar.progress.tasks[0].time_remaining
        bar._stop()
    assert left == 840


def test_tokens_per_second_are_those_of_the_last_steps_without_validations(monkeypatch, tmp_path):
    now = iter([10.0, 12.0, 13.0, 99.0, 101.0])
    bar = StepProgressBar()
    trainer = make_trainer(tmp_path, 3, callbacks=[bar], enable_progress_bar=True)
    monkeypatch.setattr("opd_lightning.callbacks.progress.time.perf_counter", lambda: next(now))
    bar.disable()  # so that nothing else asks for the time
    bar.on_train_start(trainer, None)  # 10
    batch = SimpleNamespace(num_response_tokens=300)
    bar.on_train_batch_end(trainer, None, None, batch, 0)  # 12
    bar.on_train_batch_end(trainer, None, None, batch, 1)  # 13
    trainer.state.fn = "fit"
    bar.on_validation_end(trainer, None)  # 99
    bar.on_train_batch_end(trainer, None, None, batch, 2)  # 101
    assert sum(tokens for tokens, _ in bar._speeds) / sum(seconds for _, seconds in bar._speeds) == 900 / 5


@pytest.mark.parametrize(
    ("factor", "words"), [(4.0, "EffOPD step 1024: moved by +4 Delta, score -0.2345 -> -0.1235"), (0.0, "not moved")]
)
def test_the_last_search_fits_into_a_line(factor, words, tmp_path):
    best = Trial(factor, -0.123456789 if factor else -0.23454)
    callback, later = Callback(), Callback()
    callback.last_search = SearchReport(1024, -0.23454, (Trial(4.0, -0.1), Trial(8.0, -9.0)), best, 1.0, 0.5, 2.0, 0)
    still, found = ScaledStep(0.0, -3.0), ScaledStep(0.1, -1.0)
    length = StepLength(still.score, (found,), found, is_bracketed=True)
    later.last_search = RateReport(1, length, 1e-6, 1.23456e-4, True, 1.0, 0)
    line = last_search(make_trainer(tmp_path, 1, callbacks=[callback, later]))
    assert words in line and len(line) <= 80
    line = last_search(make_trainer(tmp_path, 1, callbacks=[later]))
    assert line == "Line search step 1: learning rate 1e-06 -> 0.000123, score -3 -> -1" and len(line) <= 80
    assert last_search(make_trainer(tmp_path, 1)) == ""


def test_a_file_gets_a_line_now_and_then(tmp_path, folders, capsys):
    fit(tmp_path, folders, StepProgressBar(plain_every_n_steps=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/5", "3/5", "4/5"]
    assert "reverse_kl" in lines[-1] and "val/avg_at_1" in lines[-1]


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_words_stand_above_the_bars_of_lightning_too(tmp_path, folders, bar):
    with on_a_terminal() as terminal:
        fit(tmp_path, folders, bar(), Watch(), limit_val_batches=0)
    said = [line for line in terminal.lines() if line.startswith("said")]
    assert said == [f"said after step {step}: " + "x" * 60 for step in range(1, 6)]


@pytest.mark.parametrize(
    ("what", "shown"), [("validate", "Validation"), ("test", "Testing"), ("predict", "Predicting")]
)
def test_other_commands_show_batches(tmp_path, folders, what, shown):
    bar = StepProgressBar()
    trainer = make_trainer(tmp_path, 1, enable_progress_bar=True, callbacks=[bar], limit_val_batches=1.0)
    with on_a_terminal() as terminal:
        getattr(trainer, what)(make_module(*folders), make_data())
    assert f"{shown} " in terminal.getvalue() and "0/1" in terminal.getvalue()
    assert not any(line.startswith(shown) for line in terminal.lines())


def test_an_error_leaves_the_screen_in_order(tmp_path, folders):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.step == 1:
                raise RuntimeError("stop")

    with on_a_terminal() as terminal, pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, folders, StepProgressBar(), Break())
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_a_bar_is_added_only_where_there_is_none():
    own = RichProgressBar()
    assert with_progress_bar([own], is_wanted=None) == [own]
    assert with_progress_bar(None, is_wanted=False) == []
    (added,) = with_progress_bar(None, is_wanted=True)
    assert isinstance(added, StepProgressBar)
    watch = Watch()
    assert with_progress_bar(watch, is_wanted=None)[0] is watch


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="plain_every_n_steps: expected an integer of at least 1, got 0"):
        StepProgressBar(0)
