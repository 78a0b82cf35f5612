"""The real command on the sandbox pair, and its mistakes in one line before any weight is loaded."""

import json

import pytest
import yaml

from opd_lightning.backends.hf import HFStudent
from opd_lightning.commands import cli

SMALL = ("--num_prompts", "2", "--num_samples", "1", "--gradient_rollouts", "1", "--position_bins", "2")


def write_config(folder, **changes):
    """What somebody would `fit`."""
    model = {
        "student": {"class_path": "HFStudent", "init_args": {"path": "sandbox:student"}},
        "teacher": {"class_path": "HFTeacher", "init_args": {"path": "sandbox:teacher", "dtype": "float32"}},
    }
    data = {
        "task": {"class_path": "ArithmeticTask", "init_args": {"num_train": 8, "num_validation": 4, "num_test": 4}},
        "sampling": {"max_new_tokens": 8},
        "prompts_per_step": 4,
    }
    settings = {
        "seed_everything": 3,
        "model": model | changes.pop("model", {}),
        "data": data | changes.pop("data", {}),
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False, "default_root_dir": str(folder)},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return str(path)


@pytest.mark.slow
def test_a_diagnosis_is_shown_and_written(tmp_path, capsys):
    cli.main(["diagnose", "--config", write_config(tmp_path), *SMALL])
    shown = capsys.readouterr()
    assert "Diagnosis before training" in shown.out and "as both models read it" in shown.out
    assert "diagnose: the student answers 2 prompts, 1 times each" in shown.err
    written = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    assert written["settings"]["seed"] == 3 and written["settings"]["teacher"] == "sandbox:teacher"
    assert (written["num_prompts"], written["num_rollouts"]) == (2, 2)
    assert written["verdicts"][0]["words"] in " ".join(shown.out.split())
    page = (tmp_path / "diagnosis" / "diagnosis.html").read_text()
    assert page.startswith("<!doctype html>") and written["verdicts"][0]["words"] in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diagnosis", "run.yaml"]  # no logs, no checkpoints


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"model": {"teacher": None}},
            (),
            "model.teacher: diagnose compares a student with its teacher, and there is none",
        ),
        (
            {},
            ("--num_prompts", "9"),
            "num_prompts: 9 prompts were asked for, but the train split has 8. Set --num_prompts 8 or",
        ),
        ({}, ("--num_prompts", "0"), "num_prompts"),
        ({}, ("--split", "training"), "expected one of"),
        ({}, ("--output", "FILE"), "output: 'FILE' cannot be a folder"),
        ({}, ("--num_prompt", "3"), "there is no option --num_prompt. Did you mean --num_prompts?"),
        ({"data": {"sampling": {"max_new_tokens": 8, "top_p": 0.5}}}, (), "top_p"),
        ({"data": {"sampling": {"max_new_tokens": 4000}}}, (), "data.sampling.max_new_tokens=4000 leaves no room"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, changes, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HFStudent, "load", lambda self: pytest.fail("weights were loaded"))
    (tmp_path / "FILE").write_text("in the way")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["diagnose", "--config", write_config(tmp_path, **changes), *arguments])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opd-lightning: error")]
    assert len(error) == 1 and message in error[0]
