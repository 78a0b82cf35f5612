"""`metrics.csv` holds every row that was logged, whatever stops the run."""

import csv
import signal

import pytest

from opd_lightning.training import metrics_file
from opd_lightning.training.metrics_file import WholeCSVLogger


def make(folder, **options):
    return WholeCSVLogger(folder, name="", version="", **options)


def rows(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_and_new_metrics_come_in_order(tmp_path):
    logger = make(tmp_path)
    for step, metrics in enumerate([{"b": 1.0}, {"b": 2.0, "a": 0.5}, {"ü, c": 3}, {"b": 4.0}]):
        logger.log_metrics(metrics, step)
    logger.finalize("success")
    expected = [{"b": "1.0", "step": "0"}, {"a": "0.5", "b": "2.0", "step": "1"}]
    assert rows(tmp_path) == [*expected, {"ü, c": "3", "step": "2"}, {"b": "4.0", "step": "3"}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


DIES = """
import os, signal, sys
from pathlib import Path
from opd_lightning.training.metrics_file import WholeCSVLogger
logger = WholeCSVLogger(sys.argv[1], name="", version="")
for step in range(9):
    logger.log_metrics({"a": step}, step)
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "writing":
    os.fsync = kill
else:
    Path.replace = kill
logger.log_metrics({"a": 9, "new": 1}, 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_kill_while_a_metric_appears_loses_no_earlier_row(forks, tmp_path, moment):
    (tmp_path / "dies.py").write_text(DIES)
    done = forks.run(tmp_path / "dies.py", tmp_path, moment)
    assert done.returncode == -signal.SIGKILL
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(9))


@pytest.mark.parametrize("metrics", [{"a": 9}, {"new": 1}])
def test_a_disk_that_is_full_for_a_while_loses_nothing(tmp_path, monkeypatch, metrics):
    logger = make(tmp_path)
    for step in range(9):
        logger.log_metrics({"a": step}, step)

    class FullDisk:
        """Takes half of what is written."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        opened = metrics_file.Path.open
        patched.setattr(
            metrics_file.Path,
            "open",
            lambda path, mode="r", **named: (
                FullDisk(opened(path, mode)) if "b" in mode else opened(path, mode, **named)
            ),
        )
        with pytest.raises(OSError, match="No space left"):
            logger.log_metrics(metrics, 9)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(9))
    logger.finalize("failed")
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
