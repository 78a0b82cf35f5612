"""What every published method must keep: its papers, and the promises of plain distillation.

A method is a file in configs/methods. Without its page and its own tests the first test here fails; the slow ones run
each of them for two steps on the sandbox.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import opd_lightning.methods
from opd_lightning.commands.cli import OPDCLI

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]
HEADINGS = ["Equation", "Paper and code", "What it needs", "Cost", "When it helps"]
TINY = {
    "trainer.default_root_dir": "runs",
    "data.num_validation_problems": 4,
    "data.prompts_per_step": 4,
    "data.sampling.max_new_tokens": 12,
}
EQUAL = {  # how teacher and student are made the same where `model.teacher` is not simply an HFTeacher: settings
}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}  # the step is the gradient


def header(path):
    return dict(re.findall(r"^# (\w+): +(.*)$", path.read_text(), flags=re.MULTILINE))


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


class Method:
    """A method's objects, built as the command builds them, as often as wanted from settings parsed once."""

    def __init__(self, path, monkeypatch):
        monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
        self.name = path.stem
        words = shlex.split(header(path)["Command"])[1:]
        tiny = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
        # the base's callbacks save and print; those of the method stay
        first = words.index("--config") + 2
        self.cli = OPDCLI([*words[:first], "--trainer.callbacks", "[]", *words[first:], *tiny])

    def build(self, changes):
        settings = self.cli.config.clone()
        for key, value in changes.items():
            settings[f"fit.{key}"] = value
        return self.cli.parser.instantiate_classes(settings).fit

    def fit(self, folder, steps=1, ckpt_path=None, **changes):
        """The student's weights after so many steps."""
        made = self.build({key.replace("__", "."): value for key, value in changes.items()})
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[
                *(made.trainer.callbacks or []),
                ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
            ],
        )
        trainer.fit(made.model, made.data, ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == steps
        return {name: tensor.clone() for name, tensor in made.model.model.named_parameters() if tensor.requires_grad}


@pytest.fixture
def method(request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Method(request.param, monkeypatch)


def size(weights, others):
    return sum((weights[name] - others[name]).double().square().sum() for name in weights) ** 0.5


every = pytest.mark.parametrize("method", CONFIGS, ids=NAMES, indirect=True)


@pytest.mark.slow
@every
def test_it_learns_resumes_exactly_and_does_not_mind_the_cut(method, tmp_path):
    start = method.fit(tmp_path / "start", steps=1, model__optimizer=SGD | {"init_args": {"lr": 0.0}})
    once = method.fit(tmp_path / "once", model__optimizer=SGD)
    cut = method.fit(tmp_path / "cut", model__optimizer=SGD, model__max_tokens_per_micro_batch=64)
    moved = size(once, start)
    assert moved > 0
    assert size(once, cut) < 1e-4 * moved + 1e-6
    whole = method.fit(tmp_path / "whole", steps=2)
    resumed = method.fit(tmp_path / "resumed", steps=2, ckpt_path=tmp_path / "whole" / "step=1.ckpt")
    assert size(whole, resumed) == 0


@pytest.mark.slow
@every
def test_equal_models_get_a_gradient_only_where_its_header_says_why(method, tmp_path):
    label = header(ROOT / "configs" / "methods" / f"{method.name}.yaml")["Equal"]
    equal = EQUAL.get(method.name, {"model__teacher__init_args__path": "sandbox:student"})
    start = method.fit(tmp_path / "start", model__optimizer=SGD | {"init_args": {"lr": 0.0}}, **equal)
    after = method.fit(tmp_path / "after", model__optimizer=SGD, **equal)
    if label.startswith("no gradient"):
        assert size(after, start) < 1e-5
    else:
        assert size(after, start) > 1e-5


def test_the_configurations_change_nothing_that_belongs_to_the_base():
    for path in CONFIGS:
        settings = yaml.safe_load(path.read_text())
        assert "student" not in settings.get("model", {}), path
        assert not {"accelerator", "devices", "max_steps"} & set(settings.get("trainer", {})), path
