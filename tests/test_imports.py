"""Imports go up the table of docs/draw_imports.py only, inside rooms too; heavy packages have one home each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "docs"))
from draw_imports import PACKAGE, ROOMS, draw, imports_of, module_of, room_imports, room_of

RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
LAZY = {("training", "backends")}
INSIDE = {  # rooms whose modules build on each other: each may import from those before it only
    "interfaces": "addresses arguments columns modes words tokens scores models generation learning problems __init__",
    "training": "schedules peak_memory stopwatch output_paths checkpoint_files sharded_checkpoints checkpoints fsdp2"
    " stored_tensors weight_updates run_points usable_weights skipped_steps metrics metrics_file defaults datamodule"
    " checks resuming first_look student_module pair_module module __init__",
}
HOMES = {
    "transformers": ("backends/hf", "sandbox"),
    "peft": ("backends/hf",),
    "vllm": ("backends/vllm",),
    "httpx2": ("backends/vllm",),
    "lightning": ("training", "callbacks", "commands", "backends/vllm"),  # the last: to leave random state alone
}
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = {"__init__", "__main__"}


def test_the_table_knows_every_room_and_no_other():
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"py.typed", "__pycache__", "__init__.pyi"}
    assert set(RANK) == names - DOORS
    assert len(names) <= 22


def test_rooms_import_from_below_only():
    for (importer, imported), is_lazy in room_imports().items():
        if (importer, imported) in LAZY:
            assert is_lazy or importer == "__init__"
        elif importer not in ("__init__", "__main__") and imported in RANK:
            assert RANK[imported] < RANK[importer], f"{importer} must not import {imported}"


def test_the_picture_is_that_of_the_code(tmp_path):
    draw(tmp_path / "imports.svg")
    assert (tmp_path / "imports.svg").read_text() == (PACKAGE.parents[1] / "docs" / "imports.svg").read_text()


def test_no_module_is_imported_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    graph = {
        name: {other for other, is_lazy in imports_of(path) if other in modules and other != name and not is_lazy}
        for name, path in modules.items()
    }
    # a package's door is imported with every module in it, which is no circle of their contents
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("room", INSIDE)
def test_modules_of_a_room_import_from_earlier_ones_only(room):
    order = INSIDE[room].split()
    assert set(order) == {path.stem for path in (PACKAGE / room).glob("*.py")}
    for place, stem in enumerate(order):
        for name, _ in imports_of(PACKAGE / room / f"{stem}.py"):
            parts = name.split(".")
            if parts[:2] == ["opd_lightning", room] and len(parts) > 2 and parts[2] in order:
                assert order.index(parts[2]) < place, f"{room}/{stem} must not import {parts[2]}"


APART = (("backends.hf", "backends.vllm"), ("backends.vllm", "backends.hf"), ("backends.vllm.", "backends.vllm.server"))


@pytest.mark.parametrize(("importer", "imported"), APART)
def test_rooms_inside_a_room_stay_apart(importer, imported):
    """Backends know nothing of each other, and vLLM in this process nothing of servers."""
    for path in FILES:
        name = module_of(path).removeprefix("opd_lightning.") + "."
        if name.startswith(importer) and not name.startswith(imported):
            for other, _ in imports_of(path):
                assert not f"{other}.".startswith(f"opd_lightning.{imported}."), f"{name} must not import {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_have_one_home(path):
    place = str(path.relative_to(PACKAGE))
    for name, _ in imports_of(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or place.startswith(homes), f"{name} is imported by {', '.join(homes)} only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert source.count("\n") <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.end_lineno - node.body[0].lineno + 1
            docstring = ast.get_docstring(node, clean=False)
            assert body - (docstring.count("\n") + 1 if docstring else 0) <= 60, node.name


def test_rooms_have_telling_names():
    for path in FILES:
        assert not {"utils", "common", "helpers", "base", "misc"} & {part.removesuffix(".py") for part in path.parts}
        assert path.stem not in sys.stdlib_module_names or path.stem.startswith("__"), room_of(path)


@pytest.mark.slow
def test_the_package_loads_neither_transformers_nor_vllm():
    # Lightning itself imports torchmetrics, which imports transformers where it is installed: that is not our doing
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules);"
        "import opd_lightning; from opd_lightning import EffOPD, EffOPDOptimizer;"
        "print({name.split('.')[0] for name in set(sys.modules) - before} & {'transformers', 'vllm', 'peft'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_public_name_can_be_imported_from_the_top():
    import opd_lightning

    for name in opd_lightning.__all__:
        assert getattr(opd_lightning, name) is not None
    assert {"OPDModule", "OPDDataModule", "EffOPD", "EffOPDOptimizer", "DivergenceObjective"} <= set(dir(opd_lightning))
    with pytest.raises(AttributeError, match="attribute Nothing"):
        opd_lightning.Nothing  # noqa: B018
