"""Every shipped YAML says what it is for, and becomes real objects."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from opd_lightning.commands import cli, shipped_configs

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def command_of(path):
    return shlex.split(re.search(r"^# Command: +opd-lightning (.*)$", path.read_text(), flags=re.MULTILINE)[1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_purpose_hardware_and_command(path):
    labels = re.findall(r"^# (\w+): ", path.read_text(), flags=re.MULTILINE)
    assert [label for label in labels if label != "Disk"] == ["Purpose", "Hardware", "Command"]
    assert "Disk" in labels or path.stem.startswith("vllm")  # overlays write what their base writes
    assert command_of(path)[-2:] == ["--config", f"@{path.stem}"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_command_builds_its_objects(path, tmp_path, monkeypatch):
    """An overlay with its base, as its command says."""
    built = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.OPDCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    here = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.devices", "1"]
    cli.OPDCLI([*command_of(path), *here])
    base = yaml.safe_load(shipped_configs.path_of(command_of(path)[2].removeprefix("@")).read_text())
    settings = yaml.safe_load(path.read_text())
    (command,) = built
    assert command.datamodule.prompts_per_step == (base["data"] | settings["data"])["prompts_per_step"]
    assert command.datamodule.seed == base["seed_everything"]
    assert command.trainer.max_steps == (base["trainer"] | settings["trainer"])["max_steps"]
    assert command.trainer.default_root_dir.endswith(settings["trainer"]["default_root_dir"])
    for callback in [*base["trainer"]["callbacks"], *settings["trainer"].get("callbacks+", [])]:
        name = callback["class_path"].rpartition(".")[2]
        assert name in {type(each).__name__ for each in command.trainer.callbacks}
    if engine := settings["data"].get("engine"):
        assert engine["class_path"].endswith(type(command.datamodule.engine).__name__)
    own = {"StartValidation", "AnswersWriter", "HeldOutMarks", "RescueCheckpoint", "StepProgressBar", "StudentSummary"}
    assert own <= {type(each).__name__ for each in command.trainer.callbacks}
    assert command.model.student is None  # nothing is loaded before it is needed


def test_no_two_configs_write_to_one_folder():
    folders = [yaml.safe_load(path.read_text())["trainer"]["default_root_dir"] for path in CONFIGS]
    assert len(set(folders)) == len(folders)
