"""Every shipped YAML says what it is for, and becomes real objects."""

import re
from pathlib import Path

import pytest
import yaml

from opd_lightning.commands import cli

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_purpose_hardware_and_command(path):
    text = path.read_text()
    for label in ("Purpose", "Hardware", "Command"):
        assert re.search(rf"^# {label}: ", text, flags=re.MULTILINE), label
    assert f"--config configs/{path.name}" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_objects(path, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(cli.OPDCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    here = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.devices", "1"]
    cli.OPDCLI(["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path), *here])
    settings = yaml.safe_load(path.read_text())
    assert built[0].datamodule.prompts_per_step == settings["data"]["prompts_per_step"]
    assert built[0].datamodule.seed == settings["seed_everything"]
    assert built[0].trainer.max_steps == settings["trainer"]["max_steps"]
    assert built[0].model.student is None  # nothing is loaded before it is needed
