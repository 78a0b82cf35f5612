"""A rescued and resumed run leaves the rows and the counters of the uninterrupted one."""

import csv

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from toys import adamw, make_data, make_module, make_trainer

from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.callbacks.start_validation import StartValidation
from opd_lightning.interfaces import Sampling

NOT_REPEATED = ("seconds/", "tokens_per_second/")


class Stop(Callback):
    """Raises at some place of the step or of the validation that follows it."""

    def __init__(self, place, step):
        self.place, self.step = place, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.place == "in a step" and batch.step == self.step:
            raise RuntimeError("broken")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (
            self.place == "in a save" and batch.step + 1 == self.step
        ):  # of another callback, after the rescue's own hook
            raise KeyboardInterrupt
        if self.place == "after a step" and batch.step + 1 == self.step:
            trainer._signal_connector._sigterm_notifier_fn(15, None)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.place == "in a validation" and trainer.global_step == self.step:
            raise SIGTERMException


def fit(folder, folders, *callbacks, steps=5, ckpt_path=None, **options):
    module = make_module(*folders, optimizer=adamw)
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None} | options
    last = [each for each in callbacks if each.place == "in a save"]
    callbacks = [StartValidation(), *(each for each in callbacks if each not in last), RescueCheckpoint(), *last]
    trainer = make_trainer(folder, steps, callbacks=callbacks, logger=logger, log_every_n_steps=1, **settings)
    data = make_data(sampling=Sampling(max_new_tokens=3), rollouts_per_prompt=1)  # what they say does not matter
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def rows(folder):
    """What all runs in the folder logged, by what and when, in the order of logging."""
    found = []
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                kept = {k: v for k, v in row.items() if v and not any(part in k for part in NOT_REPEATED)}
                found.append(sorted(kept.items()))
    return found


def counters(trainer):
    state = trainer.fit_loop.state_dict()
    state.pop("combined_loader", None)  # the prompt stream, which other tests look at
    del state["epoch_loop.val_loop.batch_progress"]  # Lightning fast-forwards it at a resume, by its own count
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    runs = {}

    def run(**options):
        key = repr(options)
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            trainer = fit(folder, (tiny_qwen3_folder, tiny_teacher_folder), **options)
            runs[key] = rows(folder), counters(trainer)
        return runs[key]

    return run


INTERVALS = [{}, {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}]


@pytest.mark.parametrize(
    "options",
    [INTERVALS[0], pytest.param(INTERVALS[1], marks=pytest.mark.slow)],
    ids=["by steps", "by passes"],
)
@pytest.mark.parametrize(
    ("place", "step"),
    [
        *(("in a step", step) for step in (1, 2, 3, 4)),
        *(("after a step", step) for step in (1, 2, 3, 4, 5)),
        *(("in a validation", step) for step in (2, 3, 4)),
        *(("in a save", step) for step in (2, 3)),
    ],
)
def test_nothing_shows_that_a_run_was_stopped(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, whole, place, step, options
):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    expected, expected_counters = whole(**options)
    try:
        trainer = fit(tmp_path, folders, Stop(place, step), **options)
    except (RuntimeError, SystemExit):
        (path,) = tmp_path.rglob("rescue.ckpt")
        trainer = fit(tmp_path, folders, ckpt_path=path, **options)
    assert rows(tmp_path) == expected
    if step < 5:  # a loop that resumes at its end has nothing left to close
        assert counters(trainer) == expected_counters


def test_a_resume_with_no_time_left_says_so(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, capsys):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, folders, Stop("in a step", 2), max_time={"hours": 1})
    (path,) = tmp_path.rglob("rescue.ckpt")
    capsys.readouterr()
    fit(tmp_path, folders, ckpt_path=path, max_time={"milliseconds": 1})
    said = capsys.readouterr().out
    assert "Nothing was trained: the checkpoint's run took 0:00:0" in said
    assert "trainer.max_time is used up. Resume with a longer one" in said
