"""`--ckpt_path last` and its kind mean the run before, or are refused."""

import os
import shutil

import pytest
import yaml

from opd_lightning.commands.ckpt_path import find_checkpoint
from opd_lightning.commands.cli import main
from opd_lightning.training.checkpoints import read_checkpoint

SETTINGS = {
    "model": {
        "student": {"class_path": "HFStudent", "init_args": {"path": "sandbox:student"}},
        "teacher": {"class_path": "HFTeacher", "init_args": {"path": "sandbox:teacher", "dtype": "float32"}},
    },
    "data": {
        "task": {"class_path": "ArithmeticTask", "init_args": {"num_train": 8, "num_validation": 4}},
        "sampling": {"max_new_tokens": 8},
        "prompts_per_step": 2,
    },
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0, "max_epochs": -1},
}
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["opd-lightning"])


def run(folder, *words, command="fit", **saver):
    saver = {"class_path": SAVER, "init_args": {"every_n_train_steps": 1, "save_last": True} | saver}
    settings = SETTINGS | {"trainer": SETTINGS["trainer"] | {"default_root_dir": str(folder), "callbacks": [saver]}}
    (folder.parent / "run.yaml").write_text(yaml.safe_dump(settings))
    main([command, "--config", str(folder.parent / "run.yaml"), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "runs"
    run(folder, "--trainer.max_steps", "2")
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs")


def make(folder, name, *, age=0):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(next(folder.rglob("last.ckpt")), path)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


class Settings(dict):
    """Parsed settings as jsonargparse hands them on."""

    init_args = property(lambda self: self["init_args"])


def test_last_goes_on_where_the_newest_run_stopped(runs, capfd):
    run(runs, "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert f"--ckpt_path last is {runs}/lightning_logs/version_0/checkpoints/last.ckpt" in capfd.readouterr().err
    newest = runs / "lightning_logs" / "version_1" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(newest)["global_step"] == 3
    saved = yaml.safe_load((newest.parent.parent / "config.yaml").read_text())
    assert saved["ckpt_path"].endswith("version_0/checkpoints/last.ckpt")  # the record names the file, not the word


def test_last_validates_the_trained_student(runs, capfd):
    run(runs, "--ckpt_path", "last", "--trainer.limit_val_batches", "1", command="validate")
    shown = capfd.readouterr()
    assert f"--ckpt_path last is {runs}" in shown.err
    assert "val/avg_at_1" in shown.out


@pytest.mark.parametrize("word", ["last", "best", "hpc"])
def test_without_a_checkpoint_nothing_starts(word, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "none", "--ckpt_path", word, "--trainer.max_steps", "1")
    assert stopped.value.code == 2
    assert f"ckpt_path: {word}, but there is no checkpoint under {tmp_path / 'none'}" in capfd.readouterr().err


def test_the_registry_is_refused(tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "none", "--ckpt_path", "registry")
    assert "a model registry is not supported" in capfd.readouterr().err


@pytest.mark.parametrize(
    "place",
    [
        "lightning_logs/version_7/checkpoints/step=1.ckpt",
        "lightning_logs/version_7/rescue.ckpt",
        "rescue.ckpt",
        "checkpoints/last.ckpt",
        "mlruns/123/abc/checkpoints/last.ckpt",
        "hpc_ckpt_1.ckpt",
    ],
)
def test_last_is_the_file_written_last_wherever_runs_leave_them(place, runs):
    make(runs, "lightning_logs/version_9/checkpoints/last.ckpt", age=100)
    newest = make(runs, place, age=-100)
    assert find_checkpoint("last", Settings(default_root_dir=str(runs)), to_train=True) == newest


def test_a_folder_named_for_checkpoints_is_looked_into(runs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    newest = shutil.copy(make(runs, "x.ckpt"), elsewhere.mkdir() or elsewhere / "x.ckpt")
    os.utime(newest, (0, newest.stat().st_mtime + 100))
    saver = Settings(init_args={"dirpath": str(elsewhere)})
    settings = Settings(default_root_dir=str(runs), callbacks=[saver], logger=[True])
    assert find_checkpoint("last", settings, to_train=True) == newest


def test_best_is_what_the_newest_run_found_best(tmp_path, capfd):
    runs = tmp_path / "runs"
    run(runs, "--trainer.max_steps", "3", monitor="train/loss", save_top_k=1, filename="{step}")
    (best,) = (path for path in runs.rglob("*.ckpt") if path.name != "last.ckpt")
    run(runs, "--ckpt_path", "best", "--trainer.limit_val_batches", "1", command="validate")
    assert f"--ckpt_path best is {best}" in capfd.readouterr().err
    best.unlink()
    with pytest.raises(ValueError, match=r"best was .* by train/loss, but it is gone"):
        find_checkpoint("best", Settings(default_root_dir=str(runs)), to_train=False)


def test_best_without_a_metric_is_refused(runs):
    with pytest.raises(
        ValueError, match=r"kept its best checkpoint by none; expected one ModelCheckpoint with a `moni"
    ):
        find_checkpoint("best", Settings(default_root_dir=str(runs)), to_train=False)


def test_weights_alone_are_not_resumed(tmp_path, capfd):
    runs = tmp_path / "runs"
    run(runs, "--trainer.max_steps", "1", save_weights_only=True)
    (path, *_) = runs.rglob("last.ckpt")
    for word, message in (("last", "hold weights only"), (str(path), "holds weights only")):
        with pytest.raises(SystemExit) as stopped:
            run(runs, "--ckpt_path", word, "--trainer.max_steps", "2")
        assert stopped.value.code == 2
        assert message in capfd.readouterr().err
    assert find_checkpoint("last", Settings(default_root_dir=str(runs)), to_train=False) == path
