"""Imports go up the table of docs/decisions.md only, and heavy packages are imported where they belong only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "opd_lightning"
ROOMS = [  # each room may import from earlier lines only; inside a room, from modules that do not import it back
    {"interfaces", "distributed", "randomness"},
    {"extrapolation", "objectives"},
    {"tasks", "selection", "rollouts"},
    {"sandbox"},
    {"backends"},
    {"training"},
    {"callbacks"},
    {"commands"},
    {"__main__", "__init__"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
LAZY = {("training", "backends"), ("__init__", "callbacks")}
HOMES = {
    "transformers": {"backends/hf", "sandbox"},
    "peft": {"backends/hf"},
    "vllm": {"backends/vllm"},
    "httpx2": {"backends/vllm"},
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up_only(path):
    room = room_of(path)
    for name in imports_of(path):
        if name.startswith("opd_lightning."):
            other = name.split(".")[1]
            is_allowed = other == room or (room, other) in LAZY or RANK[other] < RANK[room]
            assert is_allowed, f"{room} must not import {other}"
        package = name.split(".")[0]
        if package in HOMES:
            place = str(path.relative_to(PACKAGE))
            assert any(place.startswith(home) for home in HOMES[package]), f"{package} has its own room"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert source.count("\n") <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.end_lineno - node.body[0].lineno + 1
            docstring = ast.get_docstring(node, clean=False)
            assert body - (docstring.count("\n") + 1 if docstring else 0) <= 60, node.name


@pytest.mark.parametrize("statement", ["import opd_lightning", "from opd_lightning import EffOPD, EffOPDOptimizer"])
def test_the_package_loads_neither_transformers_nor_vllm(statement):
    # Lightning itself imports torchmetrics, which imports transformers where it is installed: that is not our doing
    code = (
        f"import sys, lightning.pytorch; before = set(sys.modules); {statement};"
        "print({name.split('.')[0] for name in set(sys.modules) - before} & {'transformers', 'vllm', 'peft'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
