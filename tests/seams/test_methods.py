"""Published methods as a user would add them: one small file behind one seam, run through the real command.

The files in `methods/` are the chapter "Your own method" of the documentation.
"""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from opd_lightning.commands.cli import main
from opd_lightning.tasks import ArithmeticTask

METHODS = Path(__file__).parent / "methods"
FILES = sorted(METHODS.glob("*.py"))
FEW_PROBLEMS = ("--data.task.num_train", "64")
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The user's folder is importable, as the working folder of the command is."""
    monkeypatch.syspath_prepend(str(METHODS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in {path.stem for path in FILES}:
            del sys.modules[name]


def fit(folder, *arguments, steps=2, task=FEW_PROBLEMS):
    """Run the command on the sandbox and return the last row of each metric."""
    main(
        [
            "fit",
            *("--config", str(QUICKSTART)),
            *("--trainer.default_root_dir", str(folder)),
            *("--trainer.max_steps", str(steps)),
            *("--trainer.callbacks", "[]"),
            *("--trainer.limit_val_batches", "0"),
            *("--trainer.enable_progress_bar", "false"),
            *("--data.prompts_per_step", "8"),
            *("--data.sampling.max_new_tokens", "24"),
            *task,
            *arguments,
        ]
    )
    lines = next(folder.glob("lightning_logs/*/metrics.csv")).read_text().splitlines()
    names = lines[0].split(",")
    metrics = {}
    for line in lines[1:]:
        metrics |= {name: float(value) for name, value in zip(names, line.split(","), strict=True) if value}
    return metrics


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_is_one_small_file_without_private_imports(path):
    source = path.read_text()
    assert source.count("\n") <= 40
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd_lightning"):
            assert not any(name.name.startswith("_") for name in node.names)
            assert node.module.count(".") <= 2 and "_" not in node.module.removeprefix("opd_lightning")


def test_the_documentation_shows_the_files_as_they_are():
    page = (Path(__file__).parents[2] / "docs" / "your_own_method.md").read_text()
    for path in FILES:
        assert f"```python\n{path.read_text()}```" in page, path.name


@pytest.mark.slow
def test_two_teachers_mixed(tmp_path):
    sandbox = {"class_path": "HFTeacher", "init_args": {"path": "sandbox:teacher", "dtype": "float32"}}
    arguments = {"first": sandbox, "second": sandbox | {"init_args": {"path": "sandbox:student", "dtype": "float32"}}}
    mixture = json.dumps({"class_path": "two_teachers.Mixture", "init_args": arguments})
    mixed = fit(tmp_path / "mixed", "--model.teacher", mixture, steps=1)
    alone = fit(tmp_path / "alone", steps=1)
    # half of the mixture is the student itself: KL(p || (p + q) / 2) is at most log 2, and below KL(p || q)
    assert 0 < mixed["train/reverse_kl"] < min(math.log(2), alone["train/reverse_kl"])


def test_early_tokens_count_more(tmp_path):
    weighted = fit(tmp_path / "weighted", "--model.token_weighting", "early_tokens.EarlyTokens", steps=1)
    plain = fit(tmp_path / "plain", steps=1)
    assert weighted["train/reverse_kl"] == plain["train/reverse_kl"]  # the same tokens ...
    assert weighted["train/token_weight"] < 1
    assert weighted["train/grad_norm"] != plain["train/grad_norm"]  # ... that count otherwise


@pytest.mark.parametrize("objective", ["DivergenceObjective", "NLL"])
def test_recorded_answers_in_place_of_the_students(tmp_path, objective):
    recorded = tmp_path / "answers.jsonl"
    problems = ArithmeticTask(num_train=64).problems("train")
    recorded.write_text("".join(json.dumps({"uid": p.uid, "response": "12"}) + "\n" for p in problems))
    source = json.dumps({"class_path": "replay.Replay", "init_args": {"path": str(recorded)}})
    without_teacher = ("--model.teacher", "null") if objective == "NLL" else ()
    metrics = fit(tmp_path / "run", "--data.source", source, "--model.objective", objective, *without_teacher)
    assert metrics["train/response_length"] == 3  # two digits and the token that closes the answer
    assert "train/rollout_mismatch" not in metrics and "train/staleness" not in metrics
    assert metrics["train/loss"] > 0


def test_an_objective_that_needs_log_probs_refuses_recorded_answers(tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text("")
    source = json.dumps({"class_path": "replay.Replay", "init_args": {"path": str(tmp_path / "answers.jsonl")}})
    asked = ("--data.source", source, "--model.objective", "SampledTokenObjective")
    for more, message in (
        ((), "SampledTokenObjective needs the log-probabilities"),
        (("--model.objective.importance", "null"), "Replay: some rollouts come from other or older weights"),
    ):
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path / "run", *asked, *more)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_advantage_with_a_baseline(tmp_path):
    objective = ("--model.objective", "SampledTokenObjective")
    plain = fit(tmp_path / "plain", *objective, steps=1)
    baseline = fit(tmp_path / "baseline", *objective, "--model.objective.advantage", "baseline.ExpectedReward", steps=1)
    # the mean of sg[A] log p is another one, the sampled tokens are the same
    assert baseline["train/sampled_log_ratio"] == plain["train/sampled_log_ratio"]
    assert baseline["train/loss"] != plain["train/loss"]


def test_a_task_without_answers(tmp_path):
    metrics = fit(
        tmp_path,
        *("--trainer.limit_val_batches", "1.0"),
        *("--trainer.val_check_interval", "2"),
        task=("--data.task", "prompts_only.Sums"),
    )
    assert "train/accuracy" not in metrics
    assert not any("avg_at" in name or "pass_at" in name for name in metrics)
    assert metrics["val/reverse_kl"] > 0
    assert metrics["val/num_problems"] == 16


def test_a_fresh_student_of_plain_torch(tmp_path):
    student = ("--model.student", "fresh_student.FreshStudent", "--data.engine", "PlainEngine")
    config = ("--model.optimizer.lr", "0.01", "--model.lr_scheduler", "null")
    metrics = fit(tmp_path, *student, *config, "--trainer.callbacks", json.dumps([SAVE]), steps=3)
    assert metrics["train/rollout_mismatch"] < 1e-4
    first = next(tmp_path.glob("lightning_logs/*/metrics.csv")).read_text()
    assert first.count("\n") >= 3
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["opd_lightning"]["student"]["class_path"] == "fresh_student.FreshStudent"


SAVE = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 3}}
