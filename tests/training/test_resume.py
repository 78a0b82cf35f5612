"""A run that is killed and resumed equals the uninterrupted one, bit for bit."""

import csv
import signal
import time
from functools import cache

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import LoraSettings
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.callbacks.start_validation import StartValidation, is_validation_due
from opd_lightning.selection import DifficultyPool, InOrder, Shuffled
from opd_lightning.training.checkpoints import check_checkpoint_file
from opd_lightning.training.schedules import WarmupDecay


def module_and_data(folders, selector=Shuffled, lora=False, seed=0, **options):
    torch.manual_seed(seed)  # a new adapter is drawn from the global generator
    module = make_module(
        *folders,
        optimizer=adamw,
        lr_scheduler=lambda optimizer: WarmupDecay(optimizer, decay="linear", total_steps=10),
        student_options={"lora": LoraSettings(r=4, dropout=0.1)} if lora else {},
    )
    return module, make_data(selector=selector(), **options)


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole_weights(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    """Weights after so many steps without a stop, trained once for each question."""

    @cache
    def train(max_steps, *options):
        module, data = module_and_data((tiny_qwen3_folder, tiny_teacher_folder), *options)
        make_trainer(tmp_path_factory.mktemp("whole"), max_steps).fit(module, data)
        return weights_of(module)

    return train


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("selector", [Shuffled, pytest.param(InOrder, marks=pytest.mark.slow), DifficultyPool])
@pytest.mark.parametrize("stop", [1, 4])  # an epoch is 3 steps: stop inside the first and inside the second
def test_stop_and_resume_equals_one_run(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, whole_weights, selector, lora, stop
):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    first, data = module_and_data(folders, selector, lora)
    trainer = make_trainer(tmp_path, stop)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    second, data = module_and_data(folders, selector, lora, seed=999)  # the global random state is not restored
    trainer = make_trainer(tmp_path, 6)
    trainer.fit(second, data, ckpt_path=tmp_path / "stop.ckpt")

    assert trainer.global_step == 6
    assert second.weight_version == 6
    assert_equal(weights_of(second), whole_weights(6, selector, lora))


class Interrupt(ModelCheckpoint):
    """Raises in the middle of a step."""

    def __init__(self, at_step):
        super().__init__(save_top_k=0)
        self.at_step = at_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.step == self.at_step:
            raise RuntimeError("the teacher's server is gone")


@pytest.mark.parametrize(
    "at_step", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_step_that_failed_is_rescued_and_done_again(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, whole_weights, at_step, capsys
):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    broken, data = module_and_data(folders, DifficultyPool)
    callbacks = [Interrupt(at_step), RescueCheckpoint()]
    with pytest.raises(RuntimeError, match="server is gone"):
        make_trainer(tmp_path, 5, callbacks=callbacks, enable_checkpointing=True).fit(broken, data)

    resumed, data = module_and_data(folders, DifficultyPool)
    (path,) = tmp_path.rglob("rescue.ckpt")
    assert f"Stopped by RuntimeError after step {at_step}; resume with --ckpt_path {path}\n" in capsys.readouterr().out
    make_trainer(tmp_path, 5).fit(resumed, data, ckpt_path=path)
    assert_equal(weights_of(resumed), whole_weights(5, DifficultyPool))


@pytest.mark.parametrize(("interval", "every_n_epochs"), [(2, None), (1.0, 1), (2, 1), (1.0, 2)])
def test_the_predicate_agrees_with_lightning(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, interval, every_n_epochs
):
    validated, predicted = [], []

    class Watch(StartValidation):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            progress = trainer.fit_loop.epoch_loop.batch_progress
            due = is_validation_due(
                num_batches=progress.total.processed,
                num_batches_in_epoch=progress.current.processed,
                epoch=trainer.current_epoch,
                interval=trainer.val_check_batch,
                every_n_epochs=trainer.check_val_every_n_epoch,
            )
            predicted.extend([batch.step] * due)

        def on_validation_end(self, trainer, pl_module):
            validated.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed - 1)

    module, data = module_and_data((tiny_qwen3_folder, tiny_teacher_folder))
    trainer = make_trainer(
        tmp_path,
        9,
        callbacks=[Watch(before_training=False)],
        limit_val_batches=1.0,
        val_check_interval=interval,
        check_val_every_n_epoch=every_n_epochs,
    )
    trainer.fit(module, data)
    assert predicted == validated
    assert validated


class NoteValidations(StartValidation):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["val/avg_at_1"])))


EVERY_SECOND = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.fixture(scope="module")
def validated(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    """The validations of a whole run, and the folder with a checkpoint of each step."""
    folder, notes = tmp_path_factory.mktemp("validated"), NoteValidations()
    module, data = module_and_data((tiny_qwen3_folder, tiny_teacher_folder))
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    make_trainer(folder, 6, callbacks=[notes, saver], enable_checkpointing=True, **EVERY_SECOND).fit(module, data)
    assert [step for step, _ in notes.seen] == [0, 2, 4, 6]
    return notes.seen, folder


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_no_validation_is_lost_at_a_resume(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, validated, stop):
    """Lightning saves a step's checkpoint before its validation and takes that validation for done."""
    (whole, folder), notes = validated, NoteValidations()
    module, data = module_and_data((tiny_qwen3_folder, tiny_teacher_folder))
    trainer = make_trainer(tmp_path, 6, callbacks=[notes], **EVERY_SECOND)
    trainer.fit(module, data, ckpt_path=folder / f"step={stop}.ckpt")
    assert notes.seen == [entry for entry in whole if entry[0] >= stop]


@pytest.mark.parametrize(
    ("options", "seed", "told"),
    [
        ({"prompts_per_step": 6}, 0, "prompts_per_step: the checkpoint was written with 4, this run has 6"),
        ({"task": LetterTask(num_train=8)}, 0, r"12.*8|8.*12"),
        ({}, 5, r"seed.*the checkpoint was written with 0, this run has 5"),
    ],
    ids=["number of prompts", "data", "seed"],
)
def test_another_run_is_refused(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, validated, options, seed, told):
    module, data = module_and_data((tiny_qwen3_folder, tiny_teacher_folder), **options)
    data.seed = seed
    with pytest.raises(ValueError, match=told):
        make_trainer(tmp_path, 6).fit(module, data, ckpt_path=validated[1] / "step=2.ckpt")


# ------------------------------------------------------------------------------------- real processes, the real command

CONFIG = """
seed_everything: 3
model:
  student: {class_path: HFStudent, init_args: {path: "sandbox:student"%(student)s}}
  teacher: {class_path: HFTeacher, init_args: {path: "sandbox:teacher", dtype: float32}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  task: {class_path: ArithmeticTask, init_args: {num_train: 40, num_validation: 8, num_test: 8}}
  selector: DifficultyPool
  source: %(source)s
  sampling: {max_new_tokens: 64}
  prompts_per_step: 8
trainer:
  accelerator: cpu
  max_steps: 12
  max_epochs: -1
  val_check_interval: 4
  check_val_every_n_epoch: null
  enable_progress_bar: false
  default_root_dir: %(root)s
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: %(root)s/saved, every_n_train_steps: 1, save_last: true}
"""


SOURCES = {"reuse": "{class_path: Reuse, init_args: {mini_batches: 2, passes: 3, max_kl: 1.0}}"}


@pytest.fixture(scope="module")
def start(forks):
    """Start the command; `is_new`: with Python, so that strings have other hashes than in the runs it is equal to."""

    def start(root, kind, *arguments, is_new=False):
        root.mkdir(exist_ok=True)
        config = root / "config.yaml"
        student = ", lora: {r: 4}" if kind == "lora" else ""
        config.write_text(CONFIG % {"root": root, "student": student, "source": SOURCES.get(kind, "OnPolicy")})
        start_process = forks.start_python if is_new else forks.start
        return start_process("opd-lightning", "fit", "--config", config, *arguments, cwd=root)

    return start


def finish(process):
    assert process.wait() == 0, process.stdout[-3000:] + process.stderr[-3000:]


def wait_for_step(process, root, step):
    """Wait until the log shows that so many steps are done."""
    deadline = time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, process.stdout[-3000:] + process.stderr[-3000:]
        for path in root.rglob("metrics.csv"):
            with path.open() as file:
                if sum(bool(row.get("train/loss")) for row in csv.DictReader(file)) >= step:
                    return
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


def trained_weights(root):
    saved = torch.load(root / "saved" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    return saved["state_dict"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, start):
    """Weights of whole runs, made once each."""
    weights = {}

    def run(kind):
        if kind not in weights:
            root = tmp_path_factory.mktemp("whole")
            finish(start(root, kind))
            weights[kind] = trained_weights(root)
        return weights[kind]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kill_after"), [("full", (2, 3)), ("lora", (4,)), ("reuse", (3,))])
def test_kill_9_and_resume_equals_one_run(tmp_path, start, uninterrupted, kind, kill_after):
    root = tmp_path / "killed"
    resume = []
    for step in kill_after:  # the delay puts the kill somewhere inside a step
        process = start(root, kind, *resume)
        wait_for_step(process, root, step)
        time.sleep(0.05 * step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        newest = max((root / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        check_checkpoint_file(newest)
        resume = ["--ckpt_path", str(newest)]
        for path in root.rglob("metrics.csv"):
            path.unlink()
    finish(start(root, kind, *resume, is_new=kind == "lora"))
    assert_equal(trained_weights(root), uninterrupted(kind))


@pytest.mark.slow
def test_sigterm_saves_first_and_the_rescue_resumes_exactly(tmp_path, start, uninterrupted):
    root = tmp_path / "stopped"
    process = start(root, "full")
    wait_for_step(process, root, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    (rescue,) = root.rglob("rescue.ckpt")
    assert f"resume with --ckpt_path {rescue}\n" in process.stdout
    finish(start(root, "full", "--ckpt_path", str(rescue)))
    assert_equal(trained_weights(root), uninterrupted("full"))
