"""Real processes, the real command: a signal ends a run with its own status, after a rescue, and never hangs it."""

import csv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


SMALL = (
    *("--data.num_validation_problems", "6", "--data.prompts_per_step", "8", "--data.sampling.max_new_tokens", "24"),
    *("--data.validation_batch_size", "2", "--trainer.val_check_interval", "2", "--trainer.max_steps", "4"),
    *("--trainer.enable_progress_bar", "false", "--data.task.num_train", "64"),
)


@pytest.fixture
def run(forks):
    """Run the command on the quickstart, made smaller; returns the process, ended in good time."""

    def run(folder, *arguments, command="fit", sender=None, ignored=None):
        words = [command, "--config", ROOT / "configs" / "quickstart.yaml", *SMALL]
        words += ["--trainer.default_root_dir", folder]
        if sender is not None:
            words.append("--trainer.callbacks+=signal_sender.SendSignal")
            words += [f"--trainer.callbacks.{name}={value}" for name, value in sender.items()]
        processes = 2 if TWO_PROCESSES[0] in arguments else 1
        return forks.run("opd-lightning", *words, *arguments, ignored=ignored, processes=processes)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
@pytest.mark.parametrize("in_validation", [False, True], ids=["step", "validation"])
def test_a_run_ended_by_a_signal_says_so_in_its_status(run, tmp_path, name, status, in_validation):
    sender = {"name": name, "step": 2, "in_validation": in_validation}
    done = run(tmp_path, sender=sender)
    assert done.returncode == status, done.stdout + done.stderr
    (path,) = tmp_path.rglob("rescue.ckpt")
    reason = "KeyboardInterrupt" if name == "SIGINT" else name
    steps = 3 if name != "SIGINT" and not in_validation else 2  # the step that a signal meets is finished first
    assert f"Stopped by {reason} after step {steps}; resume with --ckpt_path {path}\n" in done.stdout


@pytest.mark.slow
def test_an_evaluation_ended_by_a_signal_says_so_in_its_status(run, tmp_path):
    sender = {"name": "SIGTERM", "step": 0, "in_validation": True}
    assert run(tmp_path, command="validate", sender=sender).returncode == 143


@pytest.mark.slow
def test_a_signal_that_is_to_be_ignored_is_ignored(run, tmp_path):
    done = run(tmp_path, sender={"name": "SIGHUP", "step": 2}, ignored="SIGHUP")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.rglob("rescue.ckpt")) == []


@pytest.mark.slow
@pytest.mark.parametrize("in_validation", [False, True], ids=["step", "validation"])
@pytest.mark.parametrize("rank", [-1, 0, 1], ids=["all", "first", "second"])
def test_two_processes_agree_to_stop_and_the_rescue_resumes(run, tmp_path, rank, in_validation):
    sender = {"name": "SIGTERM", "step": 2, "rank": rank, "in_validation": in_validation}
    done = run(tmp_path, *TWO_PROCESSES, sender=sender)
    assert done.returncode == 143, done.stdout + done.stderr
    (path,) = tmp_path.rglob("rescue.ckpt")
    assert f"Stopped by SIGTERM after step 3; resume with --ckpt_path {path}\n" in done.stdout
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 3


def rows(folder):
    """What was logged of each step, the newest row where a run was resumed; clocks and places left out."""
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get("train/reverse_kl"):
                    found[row["step"]] = [row["train/reverse_kl"], row["train/grad_norm"], row["train/accuracy"]]
    return found


@pytest.mark.slow
def test_an_exception_on_one_of_two_processes_ends_both_and_loses_nothing(run, tmp_path):
    for rank in (0, 1):
        folder = tmp_path / f"rank{rank}"
        done = run(folder, *TWO_PROCESSES, sender={"name": "exception", "step": 2, "rank": rank})
        assert done.returncode not in (0, 124), done.stdout + done.stderr
        assert f"rank {rank}: stopped by RuntimeError: this rank is broken" in done.stderr
        (path,) = folder.rglob("rescue.ckpt")
        says = f"rank {rank}: Stopped by RuntimeError after step 2; resume with --ckpt_path {path}\n"
        assert says in done.stderr, done.stderr
        assert torch.load(path, weights_only=True)["global_step"] == 2
    assert run(folder, *TWO_PROCESSES, "--ckpt_path", path).returncode == 0
    assert run(tmp_path / "whole", *TWO_PROCESSES).returncode == 0
    assert rows(folder) == rows(tmp_path / "whole")


@pytest.mark.slow
def test_what_lies_on_the_other_process_too_is_not_rescued_alone(run, tmp_path):
    sender = {"name": "exception", "step": 2, "rank": 1}
    source = ("--data.source", "Reuse", "--data.source.mini_batches", "2", "--data.source.passes", "2")
    done = run(tmp_path, *TWO_PROCESSES, *source, sender=sender)
    assert done.returncode not in (0, 124), done.stdout + done.stderr
    reason = "rank 1: No rescue: part of it lies on the other processes. There is no checkpoint yet: start again."
    assert reason in done.stderr, done.stderr
    assert list(tmp_path.rglob("*.ckpt")) == []


@pytest.mark.slow
def test_a_process_that_waits_in_vain_gives_up(run, tmp_path):
    absent = ("--trainer.callbacks+=signal_sender.SendSignal", "--trainer.callbacks.name=absence")
    absent += ("--trainer.callbacks.step=2", "--trainer.callbacks.rank=1")
    patience = ("--trainer.callbacks+=RescueCheckpoint", "--trainer.callbacks.patience=4")
    sender = {"name": "SIGTERM", "step": 2, "rank": 0}
    done = run(tmp_path, *TWO_PROCESSES, *absent, *patience, sender=sender)
    assert done.returncode == 143, done.stdout + done.stderr
    assert "rank 0: was to stop and waited 4 s for the other processes; no rescue is saved." in done.stderr
    for path in tmp_path.rglob("rescue.ckpt"):  # the absent one came back, found nobody, and saved what it had
        assert torch.load(path, weights_only=True)["global_step"] == 2
