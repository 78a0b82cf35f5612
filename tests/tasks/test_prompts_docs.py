"""The YAML of docs/prompts.md means what the page says."""

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from opd_lightning.commands.short_names import import_rooms
from opd_lightning.commands.template_settings import TemplateSettings
from opd_lightning.interfaces import PromptSelector, Task
from opd_lightning.selection import Mixture, Weighted
from opd_lightning.tasks import MathTask, MixedTask, PromptTask, ScoredTask

PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
TEMPLATES, SCORED, WEIGHTED, MIXED = (yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))


def build(settings, kind, name):
    import_rooms()
    parser = LightningArgumentParser()
    parser.add_argument(f"--{name}", type=kind)
    return parser.instantiate(parser.parse_object({name: settings["data"][name]}))[name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_build_what_is_meant():
    assert [TemplateSettings(**each).name for each in TEMPLATES["templates"]] == [
        "boxed",
        "unwrapped",
        "not thinking",
        "file",
    ]
    scored = build(SCORED, Task, "task")
    assert isinstance(scored, ScoredTask) and isinstance(scored.inner, MathTask)
    assert (scored.rank_by, scored.keep, scored.prefer, scored.missing) == ("teacher_gain", 0.5, "highest", "refuse")
    weighted = build(WEIGHTED, PromptSelector, "selector")
    assert isinstance(weighted, Weighted) and weighted.column == "scores.teacher_gain"
    mixed, selector = build(MIXED, Task, "task"), build(MIXED, PromptSelector, "selector")
    assert isinstance(mixed, MixedTask) and isinstance(mixed.others["chat"], PromptTask)
    assert isinstance(selector, Mixture) and set(selector.weights) == {mixed.name, *mixed.others}
