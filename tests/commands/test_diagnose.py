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
    rows = [json.loads(line) for line in (tmp_path / "diagnosis" / "prompts.jsonl").read_text().splitlines()]
    assert [row["num_answers"] for row in rows] == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diagnosis", "run.yaml"]  # no logs, no checkpoints


@pytest.mark.slow
def test_a_student_with_another_template_is_told_to_take_the_teachers(tmp_path, capsys):
    student = {"path": "sandbox:student", "chat_template": "{{ messages[-1]['content'] }}<|assistant|>"}
    config = write_config(
        tmp_path,
        model={"student": {"class_path": "HFStudent", "init_args": student}},
        data={"sampling": {"max_new_tokens": 72}},
    )
    small = ("--num_prompts", "8", "--num_samples", "1", "--gradient_rollouts", "1")
    with pytest.warns(UserWarning, match="chat templates of student and teacher differ"):
        cli.main(["diagnose", "--config", config, *small, "--templates", "[]"])
    shown = " ".join(capsys.readouterr().out.split())
    assert 'Take the template "the teacher\'s own": under the present one the teacher is less often right' in shown
    overlay = tmp_path / "diagnosis" / "template.yaml"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--config", config, "--config", str(overlay), "--print_config"])
    taken = yaml.safe_load(capsys.readouterr().out)["model"]["student"]
    assert taken["class_path"].endswith("HFStudent") and taken["init_args"]["path"] == "sandbox:student"
    template = HFStudent(**{name: taken["init_args"][name] for name in ("path", "chat_template")}).tokenizer.template
    assert template == HFStudent("sandbox:teacher").tokenizer.template


@pytest.mark.slow
def test_prompts_alone_are_scored(tmp_path, capsys):
    cli.main(["diagnose", "--config", write_config(tmp_path), *SMALL, "--parts", "prompts"])
    assert "Scores of prompts" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "diagnosis").glob("*.jsonl")] == ["scores.jsonl"]


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
        ({}, ("--parts", "some"), "expected one of"),
        (
            {},
            ("--parts", "prompts", "--templates", "[]", "--num_prompts", "2"),
            "templates: --parts prompts scores prompts and nothing else. Leave one",
        ),
        (
            {},
            ("--parts", "prompts", "--coverage_cells", "9", "--num_prompts", "2"),
            "coverage_cells: --parts prompts scores prompts and nothing else. Leave one",
        ),
        (
            {},
            ("--templates", "[{suffix: x}]", "--num_prompts", "2"),
            "data.task: ArithmeticTask has no setting 'suffix' to put its questions",
        ),
        ({}, ("--templates", "[{sufix: x}]"), "sufix"),
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
