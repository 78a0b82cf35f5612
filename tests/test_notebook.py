"""The notebook runs as it stands, uses public names only, and carries small outputs into git."""

import ast
import json
import sys
from pathlib import Path

import pytest

import opd_lightning

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "notebooks" / "sandbox.ipynb"
CELLS = json.loads(PATH.read_text())["cells"]
OUTPUTS = [output for cell in CELLS for output in cell.get("outputs", [])]


def code():
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_uses_public_names_only():
    imported = [node for cell in code() for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imported if node.module.startswith("opd_lightning")]
    assert {node.module for node in ours} == {"opd_lightning"}
    assert {alias.name for node in ours for alias in node.names} <= set(opd_lightning.__all__)


def test_its_outputs_are_small_and_say_nothing_of_the_machine():
    assert PATH.stat().st_size < 100_000
    assert {output["output_type"] for output in OUTPUTS} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in OUTPUTS)
    assert not any("execution" in cell["metadata"] for cell in CELLS)
    text = "".join("".join(output.get("text", "")) for output in OUTPUTS)
    assert "accuracy" in text and "/" not in text


def test_a_method_takes_one_cell():
    (cell,) = [cell for cell in code() if "TokenWeighting)" in cell]
    assert "class " in cell and ".fit(" in cell
    assert cell.count("\n") <= 12


@pytest.mark.slow
def test_it_runs_and_shows_what_is_shown(tmp_path):
    sys.path.append(str(ROOT / "docs"))
    from run_notebook import run

    done = run(PATH, tmp_path)
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert [output.output_type for output in outputs] == [output["output_type"] for output in OUTPUTS]
    said = next(output.text for output in outputs if output.output_type == "stream")
    words = said.replace("%", "").split()
    assert float(words[3]) > float(words[1]) + 20  # after and before, in percent
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", "tokens.html"}
    assert "<html" in (tmp_path / "tokens.html").read_text(encoding="utf-8")
