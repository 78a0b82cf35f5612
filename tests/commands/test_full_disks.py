"""A disk that is full or can only be read ends a run in one line that says where; what was written stays."""

import csv
import os
import subprocess

import pytest
from test_ckpt_path import run

from opd_lightning.training.checkpoints import read_checkpoint

CSV = "opd_lightning.training.metrics_file.WholeCSVLogger"
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["opd-lightning"])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 96 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", place]).returncode:
        pytest.skip("needs to mount a disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("logger", [CSV, TENSORBOARD])
def test_a_full_disk_under_a_logger_is_named_and_nothing_else_is_lost(logger, small_disk, tmp_path, capfd):
    """The checkpoints lie on another disk, and the rescue goes there."""
    words = ["--trainer.max_steps", "60", "--trainer.logger", logger, "--trainer.logger.save_dir", str(small_disk)]
    words += ["--trainer.log_every_n_steps", "1"]
    saved = tmp_path / "saved"
    (small_disk / "ballast").write_bytes(bytes(64 * 1024))
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stopped:
        run(runs, *words, dirpath=str(saved), save_last=False, save_top_k=1, every_n_train_steps=5)
    shown = capfd.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("opd-lightning: error: ")]
    assert stopped.value.code == 1
    assert "Traceback" not in shown.err
    assert f"No space left on device while writing to '{small_disk}/lightning_logs/version_0'" in line
    assert "0.0 GiB free" in line and "resume with --ckpt_path" in line
    step = read_checkpoint(saved / "rescue.ckpt")["global_step"]
    assert step > 0
    if logger == CSV:
        with (small_disk / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(len(rows)))
        assert step - 1 <= len(rows) <= step and all(row["train/grad_norm"] for row in rows)
