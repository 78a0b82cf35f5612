"""Every block of docs/objectives.md runs, and its tables name what there is; docs/metrics.md names every fact."""

import re
from pathlib import Path

import pytest
from test_objective_settings import parser

from opd_lightning import objectives
from opd_lightning.interfaces import Objective, ScoreRequest
from opd_lightning.objectives import (
    NLL,
    CandidateScore,
    Clipped,
    Divergence,
    DivergenceObjective,
    Estimator,
    Importance,
    JensenShannon,
    SampledTokenObjective,
    StudentTopK,
    Support,
    TeacherTopK,
    known_facts,
)

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "objectives.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


MEANT = [  # what the blocks say, in their order
    DivergenceObjective(chunk_tokens=256),
    DivergenceObjective(TeacherTopK(20, "tail")),
    DivergenceObjective(StudentTopK(16)),
    DivergenceObjective(StudentTopK(16, "none"), estimator=CandidateScore()),
    DivergenceObjective(StudentTopK(16, "none"), estimator=CandidateScore(centered=True)),
    DivergenceObjective(divergence=JensenShannon(0.1)),
    SampledTokenObjective(),
    SampledTokenObjective(importance=Clipped()),
    NLL(),
]


@pytest.mark.parametrize(("block", "meant"), list(zip(blocks("yaml"), MEANT, strict=True)))
def test_a_yaml_block_builds_what_is_meant(block, meant):
    built = parser().instantiate(parser().parse_string(block)).model.objective
    assert type(built) is type(meant)
    assert vars(built) == vars(meant)


def test_the_command_line_of_the_page_is_understood():
    options = re.search(r"`(--model\.objective\.support \S+ .*?)`", PAGE)[1].split()
    assert parser().instantiate(parser().parse_args(options)).model.objective.support == StudentTopK(8)


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_runs(block):
    names = {}
    exec(block, names)
    assert any(isinstance(value, Objective) for value in names.values())


@pytest.mark.parametrize(
    "seam", [Objective, Support, Divergence, Estimator, Importance], ids=lambda seam: seam.__name__
)
def test_the_tables_name_every_class(seam):
    shipped = [name for name in objectives.__all__ if issubclass_of(getattr(objectives, name), seam)]
    assert shipped
    for name in shipped:
        assert re.search(rf"^\| `{name}\b", PAGE, flags=re.MULTILINE), name


def issubclass_of(value, seam):
    return isinstance(value, type) and issubclass(value, seam) and value is not seam


def test_the_page_of_metrics_names_every_fact():
    page = (DOCS / "metrics.md").read_text()
    for name in known_facts(ScoreRequest(full_vocabulary=True), 16):
        assert re.search(rf"^\|[^|]*`{name}`", page, flags=re.MULTILINE), name
