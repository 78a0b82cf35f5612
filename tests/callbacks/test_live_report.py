"""The page while a run goes, and what a run keeps for it."""

import json
import os

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from toys import LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning import EffOPD
from opd_lightning.callbacks import live_report
from opd_lightning.callbacks.held_out_marks import HeldOutMarks
from opd_lightning.callbacks.live_report import LiveReport
from opd_lightning.callbacks.start_validation import StartValidation
from opd_lightning.callbacks.token_recorder import TokenRecorder
from opd_lightning.reports.training_runs.folder import read_runs
from opd_lightning.training.metrics_file import WholeCSVLogger

VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
QUICK = {"top_k_metrics": 0, "optimizer": adamw}


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def fit(folder, folders, *callbacks, steps=3, data=None, **options):
    module = make_module(*folders, **QUICK)
    logger = [WholeCSVLogger(folder, name=None, version="")]
    options = {"logger": logger, "log_every_n_steps": 1, "callbacks": list(callbacks)} | options
    trainer = make_trainer(folder, steps, **options)
    trainer.fit(module, data or make_data())
    return module, trainer


def without_curves(monkeypatch):
    """They take time, and are another test's."""
    monkeypatch.setattr("opd_lightning.reports.training_runs.page.can_draw", lambda: False)


class Pages(Callback):
    """Looks at the page at the start of each step, and moves the clock on."""

    def __init__(self, folder, clock):
        self.page, self.clock, self.seen = folder / "report" / "report.html", clock, []

    def on_train_batch_start(self, trainer, *_):
        text = self.page.read_text() if self.page.exists() else ""
        self.seen.append((trainer.global_step, f"{trainer.global_step} steps" in text, 'content="60"' in text))
        self.clock[0] += 40.0


def test_a_page_after_the_first_step_then_now_and_then_and_at_the_end(tmp_path, folders, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(live_report.time, "monotonic", lambda: clock[0])
    without_curves(monkeypatch)
    pages = Pages(tmp_path, clock)
    plain, _ = fit(tmp_path / "plain", folders, steps=4)
    shown, _ = fit(tmp_path, folders, LiveReport("1m"), pages, steps=4)
    assert pages.seen == [(0, False, False), (1, True, True), (2, False, True), (3, True, True)]
    text = (tmp_path / "report" / "report.html").read_text()
    assert "4 steps" in text and "refresh" not in text
    assert json.loads((tmp_path / "report" / "report.json").read_text())["runs"][0]["num_steps"] == 4
    assert sorted(os.listdir(tmp_path / "report")) == ["report.html", "report.json"]
    assert all(torch.equal(weight, weights_of(shown)[name]) for name, weight in weights_of(plain).items())


def test_writing_takes_a_hundredth_of_the_time_at_most(tmp_path, folders, monkeypatch):
    clock, written = [0.0], []

    def write(folder, runs, *, refresh_seconds, fragments):
        written.append((clock[0], refresh_seconds))
        clock[0] += 2.0

    class Step(Callback):
        def on_train_batch_end(self, *_):
            clock[0] += 100.0

    monkeypatch.setattr(live_report.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live_report, "write_report", write)
    fit(tmp_path, folders, LiveReport("30s"), Step(), steps=5)
    assert written == [(100.0, 30), (302.0, 200), (504.0, None)]  # 2 seconds are followed by 200 others


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, folders, monkeypatch):
    without_curves(monkeypatch)
    (tmp_path / "report").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"LiveReport: the page could not be written \(.*; the run goes on"):
        _, trainer = fit(tmp_path, folders, LiveReport())
    assert trainer.global_step == 3


def test_what_cannot_be_drawn_is_a_warning(tmp_path, folders, monkeypatch):
    def draw(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("opd_lightning.reports.training_runs.page.can_draw", lambda: True)
    monkeypatch.setattr("opd_lightning.reports.training_runs.page.draw_alone", draw)
    with pytest.warns(UserWarning, match=r"LiveReport: the page could not be written \(no fonts\); the run goes on"):
        _, trainer = fit(tmp_path, folders, LiveReport(), steps=1)
    assert trainer.global_step == 1


def test_the_last_page_has_the_tokens(tmp_path, folders, monkeypatch):
    without_curves(monkeypatch)
    pages = Pages(tmp_path, [0.0])
    fit(tmp_path, folders, TokenRecorder(num_rollouts=1, num_fixed=1), LiveReport(), pages, steps=2)
    page = (tmp_path / "report" / "report.html").read_text()
    assert pages.seen[-1] == (1, True, False) and '"label":"step 2"' in page


@pytest.mark.parametrize("every", ["5", "0s", "soon", "-1m", "5 m"])
def test_times_that_are_none(every):
    with pytest.raises(ValueError, match=rf"LiveReport.every: expected a time such as 30s, 5m or 1h, got '{every}'"):
        LiveReport(every)


def test_without_metrics_it_is_refused_at_once(tmp_path, folders):
    with pytest.raises(ValueError, match=r"LiveReport: it reads the metrics\.csv of a CSVLogger"):
        fit(tmp_path, folders, LiveReport(), logger=False)


def test_tensorboard_gets_a_figure_of_every_search(tmp_path, folders, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(live_report, "write_report", lambda *_, **__: None)
    logger = [TensorBoardLogger(tmp_path, name="", version=""), WholeCSVLogger(tmp_path, name=None, version="")]
    search = EffOPD(lambda module: 0.0, schedule=[1, 3], candidates=(1.0,))
    fit(tmp_path, folders, search, LiveReport("1h"), steps=3, logger=logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("effopd/search")] == [1, 3]


def test_marks_of_single_problems_are_those_of_the_validation(tmp_path, folders):
    task = LetterTask(num_held_out=5)
    data = make_data(task=task, validation_samples=2, validation_batch_size=2)
    options = VALIDATED | {"val_check_interval": 2, "log_every_n_steps": 3}  # most validations have no row of training
    fit(tmp_path, folders, StartValidation(), HeldOutMarks(), steps=4, data=data, **options)
    (run,) = read_runs([tmp_path])
    assert list(run.marks) == list(run.series["val/avg_at_2"]) == [0, 2, 4] and run.num_steps == 4
    assert all(len(marks) == 5 for marks in run.marks.values())
    for step, marks in run.marks.items():
        assert run.series["val/avg_at_2"][step] == pytest.approx(sum(marks.values()) / 5)
    lines = (tmp_path / "held_out_marks.jsonl").read_text().splitlines()
    assert len(json.loads(lines[0])["marks"]["validation/0"]) == 2


def test_marks_of_another_run_in_the_folder_are_gone_and_those_of_this_one_stay(tmp_path, folders):
    path = tmp_path / "held_out_marks.jsonl"
    path.write_text('{"step":7,"marks":{"x":[1.0]}}\n')
    module, trainer = fit(tmp_path, folders, HeldOutMarks(), steps=1, **VALIDATED)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, trainer.datamodule)  # on, in the same run
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_marks_that_cannot_be_written_are_a_warning(tmp_path, folders):
    (tmp_path / "held_out_marks.jsonl").mkdir()
    with pytest.warns(UserWarning, match="HeldOutMarks: .* could not be written .*; the run goes on"):
        fit(tmp_path, folders, HeldOutMarks(), steps=1, **VALIDATED)
