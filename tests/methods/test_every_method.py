"""What every published method must keep: its papers, and the promises of plain distillation.

A method is a file in configs/methods. Without its page and its own tests the first test here fails; the slow ones run
each of them for two steps on the sandbox.
"""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from built_methods import BEFORE, CONFIGS, NAMES, ROOT, SGD, Method, chat_address, header, make_files

import opd_lightning.methods

HEADINGS = ["Equation", "Paper and code", "What it needs", "Cost", "When it helps"]
EQUAL = {  # how teacher and student are made the same where `model.teacher` is not simply an HFTeacher: settings
    "antisd": {},  # they are
    "eopd": {  # at the defaults no gate opens in so few tokens
        "model__teacher__init_args__path": "sandbox:student",
        "model__objective__init_args__threshold": 0.0,
        "model__objective__init_args__k": 2,
    },
    "lightning_opd": {"model__teacher__init_args__path": "equal.jsonl", "data__source__init_args__path": "equal.jsonl"},
    "ropd": {},  # there is none
    "exopd": {"model__teacher__init_args__teacher__init_args__path": "sandbox:student"},
    "extrapolation_cliff": {"model__teacher__init_args__teacher__init_args__path": "sandbox:student"},
    "mad_opd": {
        f"model__teacher__init_args__teacher__init_args__teachers__{name}__init_args__path": "sandbox:student"
        for name in ("first", "second")
    },
    "multi_teacher": {
        f"model__teacher__init_args__teachers__{name}__init_args__path": "sandbox:student" for name in ("short", "long")
    },
    "opsd": {},  # they are
    "sdpo": {},
}


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_method_has_its_page_and_tests_of_its_own(path):
    name, labels = path.stem, header(path)
    assert list(labels) == ["Purpose", "Needs", "Equal", "Command"]
    assert re.search(r"\(arXiv \d{4}\.\d{5}", labels["Purpose"]) or "recipe" in labels["Purpose"]
    assert shlex.split(labels["Command"])[-2:] == ["--config", f"@methods/{name}"]
    assert labels["Equal"].startswith(("no gradient", "a gradient"))  # the second says why
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert re.findall(r"^## (.*)$", page, flags=re.MULTILINE)[: len(HEADINGS)] == HEADINGS
    assert f"](methods/{name}.md)" in (ROOT / "docs" / "methods.md").read_text()
    assert (Path(__file__).parent / f"test_{name}.py").exists()


def test_every_class_of_the_room_is_named_in_a_configuration_or_on_a_page():
    texts = "".join(path.read_text() for path in [*CONFIGS, *(ROOT / "docs" / "methods").glob("*.md")])
    assert [name for name in opd_lightning.methods.__all__ if not re.search(rf"\b{name}\b", texts)] == []


@pytest.fixture(scope="module", params=CONFIGS, ids=NAMES)
def method(request, tmp_path_factory):
    """Each method once for all tests, in a folder with the files that it reads."""
    with contextlib.chdir(tmp_path_factory.mktemp(request.param.stem)):
        try:
            make_files(request.param.stem)
            yield Method(request.param)
        except SystemExit as ended:  # pytest would lose its way
            raise AssertionError("the command did not accept the configuration") from ended


def size(weights, others):
    return sum((weights[name] - others[name]).double().square().sum() for name in weights) ** 0.5


@pytest.fixture(scope="module")
def first_step(method, tmp_path_factory):
    """Size and end of the step of plain SGD."""
    once = method.fit(tmp_path_factory.mktemp("once"), model__optimizer=SGD)
    return size(once, method.start), once


@pytest.mark.slow
def test_it_learns_resumes_exactly_and_does_not_mind_the_cut(method, first_step, tmp_path):
    moved, once = first_step
    assert moved > 0
    cut = method.fit(tmp_path / "cut", model__optimizer=SGD, model__max_tokens_per_micro_batch=64)
    assert size(once, cut) < 1e-4 * moved + 1e-6
    whole = method.fit(tmp_path / "whole", steps=2)
    resumed = method.fit(tmp_path / "resumed", steps=2, ckpt_path=tmp_path / "whole" / "step=1.ckpt")
    assert size(whole, resumed) == 0


@pytest.fixture(scope="module")
def on_two_processes(forks, tmp_path_factory):
    """A folder with the weights of every method after the same step on two processes."""
    folder = tmp_path_factory.mktemp("processes")
    with contextlib.chdir(folder):
        for name in BEFORE:
            make_files(name)
    program = Path(__file__).parent / "every_method_run.py"
    done = forks.run(program, folder, chat_address(), cwd=folder, seconds=60 * len(NAMES))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(method, on_two_processes, first_step):
    moved, once = first_step
    two = torch.load(on_two_processes / f"{method.name}.pt")
    assert size(once, two) < 1e-4 * moved + 1e-6


@pytest.mark.slow
def test_equal_models_get_a_gradient_only_where_its_header_says_why(method, tmp_path):
    label = header(ROOT / "configs" / "methods" / f"{method.name}.yaml")["Equal"]
    equal = EQUAL.get(method.name, {"model__teacher__init_args__path": "sandbox:student"})
    after = method.fit(tmp_path / "after", model__optimizer=SGD, **equal)
    if label.startswith("no gradient"):
        assert size(after, method.start) < 1e-5
    else:
        assert size(after, method.start) > 1e-5


def test_the_configurations_change_nothing_that_belongs_to_the_base():
    for path in CONFIGS:
        settings = yaml.safe_load(path.read_text())
        assert "student" not in settings.get("model", {}), path
        assert not {"accelerator", "devices", "max_steps"} & set(settings.get("trainer", {})), path
