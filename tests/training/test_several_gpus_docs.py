"""The recipes for several nodes: what they start is built, as far as one process can."""

import shlex

import pytest
from doc_blocks import blocks

from opd_lightning import FSDP2Strategy
from opd_lightning.commands import cli

RECIPES = [block for block in blocks() if block.page == "docs/several_gpus.md" and "num_nodes" in block.code]


@pytest.mark.parametrize("block", RECIPES, ids=["torchrun", "slurm"])
def test_a_recipe_builds_its_run(block, tmp_path, monkeypatch):
    built = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.OPDCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    (line,) = (line for line in block.code.replace("\\\n", " ").splitlines() if "fit" in line)
    words = shlex.split(line)
    words = words[words.index("fit") :]
    cli.OPDCLI([*words, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"])
    (command,) = built
    assert isinstance(command.trainer.strategy, FSDP2Strategy)
    assert (command.trainer.num_nodes, command.trainer.num_devices) == (2, 8)
