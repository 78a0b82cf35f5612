"""Real runs, stopped at random moments: what they leave behind is whole, and goes on as if nothing had happened."""

import csv
import errno
import os
import signal
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from campaign import IS_LONG

from opd_lightning.training.checkpoint_files import find_damage

pytest_plugins = ("campaign",)
pytestmark = pytest.mark.slow
STEPS = 6
NUM_KILLS, NUM_DISKS = (50, 24) if IS_LONG else (8, 4)
ENDS_BY_TIMER = -signal.SIGPROF
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
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_last": "link"},
            }
        ],
    },
}
LOGGED = ("train/reverse_kl", "train/grad_norm", "val/avg_at_1")


class Runs:
    """Runs in folders below one, each compared with the whole one."""

    def __init__(self, folder, start):
        self.start = start
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(SETTINGS))
        self.folder = folder / "whole"
        self.outcome = self.fit(self.folder)
        assert self.outcome.status == 0, self.outcome.said
        self.rows, self.state = rows(self.folder), newest(self.folder)
        assert len(self.rows) >= STEPS and self.state["global_step"] == STEPS

    def fit(self, folder, *words, **accidents):
        command = ["fit", "--config", self.config, "--trainer.default_root_dir", folder, *words]
        return self.start(command, **accidents)

    def has_ended(self, folder):
        """Whether the run there has trained all of its steps."""
        return any(folder.rglob("*.ckpt")) and same(newest(folder), self.state)

    def go_on(self, folder):
        """What is wrong with the folder of a run that was stopped, and how many rows of metrics are gone for good."""
        checkpoints = list(folder.rglob("*.ckpt"))
        if damaged := [path.name for path in checkpoints if find_damage(path)]:
            return f"damaged: {damaged}", 0
        resumed = self.fit(folder, *(["--ckpt_path", "last"] if checkpoints else []))
        if resumed.status != 0:
            return f"does not resume: {resumed.said[-2000:]}", 0
        if not same(newest(folder), self.state):
            return "ends with another state", 0
        found = rows(folder)
        if wrong := [step for step, row in found.items() if row != self.rows[step]]:
            return f"other metrics at {wrong}", 0
        return None, len(self.rows) - len(found)


def rows(folder):
    """What was logged, by kind and step; of a step that was done twice the later."""
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name in LOGGED:
                    if row.get(name):
                        found.setdefault((name.split("/")[0], row["step"]), {})[name] = row[name]
    return found


def newest(folder):
    there = filter(Path.exists, folder.rglob("*.ckpt"))  # a kill may leave the link last.ckpt without its target
    path = max(there, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"))
    content = torch.load(path, weights_only=True)
    return {name: content[name] for name in ("global_step", "state_dict", "optimizer_states")}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start):
    return Runs(tmp_path_factory.mktemp("runs"), start)


def lost_rows(number, num_runs):
    return f"{number} rows of metrics.csv in {num_runs} runs" if number else "nothing"


@pytest.mark.parametrize("moments", ["processor time", "writes"])
def test_killed(runs, rng, report, tmp_path, moments):
    failures, num_lost = [], 0
    for i in range(NUM_KILLS // 2):
        if moments == "writes":
            accident = {"signals": [[rng.randint(1, runs.outcome.num_events), signal.SIGKILL]]}
        else:
            accident = {"cpu": rng.uniform(0, runs.outcome.seconds)}
        folder = tmp_path / str(i)
        killed = runs.fit(folder, **accident)
        problem, lost = runs.go_on(folder)
        if problem is None and killed.status not in (-signal.SIGKILL, ENDS_BY_TIMER, 0):  # 0: it was over by then
            problem = f"status {killed.status}: {killed.said[-2000:]}"
        if problem is None and lost > 1:
            problem = f"{lost} rows lost"
        num_lost += lost
        failures += [(accident, problem)] if problem else []
    report(f"killed at a random moment of its {moments}", NUM_KILLS // 2, failures, lost_rows(num_lost, NUM_KILLS // 2))


def test_signals_in_pairs(runs, rng, report, tmp_path):
    """The second comes within the rescue that the first began, or near it."""
    failures, num_lost, num_without, number = [], 0, 0, 0
    for first, second in [*product((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), repeat=2)] * (3 if IS_LONG else 1):
        number += 1
        event = rng.randint(runs.outcome.num_events // STEPS, runs.outcome.num_events - 200)
        accident = {"signals": [[event, first], [event + rng.randint(1, 150), second]]}
        folder = tmp_path / str(number)
        stopped = runs.fit(folder, **accident)
        problem, lost = None, 0
        is_done = "Traceback" not in stopped.said and runs.has_ended(folder)  # before the first signal came
        if not is_done and not stopped.is_told_in_one_line(128 + first, 128 + second):
            problem = f"status {stopped.status}: {stopped.said[-3000:]}"
        num_without += not is_done and not list(folder.rglob("rescue.ckpt"))
        problem, lost = (problem, 0) if problem else runs.go_on(folder)
        num_lost += lost
        failures += [(accident, problem)] if problem else []
    lost = f"the rescue, but no checkpoint, of {num_without} runs" if num_without else "nothing"
    report("two signals", number, failures, lost + (f"; {lost_rows(num_lost, number)}" if num_lost else ""))


def test_disks_that_fail(runs, rng, report, tmp_path):
    kinds = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO]
    failures, num_lost = [], 0
    for i in range(NUM_DISKS):
        accident = {"fails": [rng.randint(1, runs.outcome.num_events), kinds[i % 4]]}
        folder = tmp_path / str(i)
        stopped = runs.fit(folder, **accident)
        problem, lost = None, 0
        if not stopped.is_told_in_one_line(1):
            problem = f"status {stopped.status}: {stopped.said[-3000:]}"
        problem, lost = (problem, 0) if problem else runs.go_on(folder)
        num_lost += lost
        failures += [(accident, problem)] if problem else []
    report("writes that fail from some moment on", NUM_DISKS, failures, lost_rows(num_lost, NUM_DISKS))


@pytest.fixture
def disk(tmp_path):
    """A disk of its own; its size can be changed."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", place]).returncode:
        pytest.skip("needs to mount a disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_real_disks(runs, rng, report, disk, kind):
    failures, num_lost, num_disks = [], 0, NUM_DISKS // 2
    for i in range(num_disks):
        folder, accident = disk / str(i), {}
        if kind == "full":
            size = rng.randint(1, 40) * 2**20
            subprocess.run(["mount", "-o", f"remount,size={size + used(disk)}", disk], check=True)
        else:
            accident = {"read_only": [rng.randint(1, runs.outcome.num_events * 9 // 10), str(disk)]}
        stopped = runs.fit(folder, **accident)
        subprocess.run(["mount", "-o", "remount,rw,size=1g", disk], check=True)
        problem, lost = None, 0
        if not stopped.is_told_in_one_line(0, 1):  # 0: a large disk
            problem = f"status {stopped.status}: {stopped.said[-3000:]}"
        problem, lost = (problem, 0) if problem else runs.go_on(folder)
        num_lost += lost
        failures += [(accident or size, problem)] if problem else []
    report(f"a {kind} disk", num_disks, failures, lost_rows(num_lost, num_disks))


def used(disk):
    info = os.statvfs(disk)
    return (info.f_blocks - info.f_bfree) * info.f_frsize
