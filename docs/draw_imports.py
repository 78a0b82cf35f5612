"""Draw which room imports which, from the code: python docs/draw_imports.py writes docs/imports.svg.

Rooms stand in rows; a room may import from rows below it only, so every arrow points down. Imports inside functions
(taken when they are first needed) are dashed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "opd_lightning"
ROOMS = (  # from the ground up; tests/test_imports.py enforces it
    ("interfaces", "distributed", "randomness", "whole_files"),
    ("extrapolation", "objectives", "geometry", "reports"),
    ("tasks", "selection", "rollouts"),
    ("sandbox", "teachers", "diagnosis"),
    ("methods",),
    ("backends",),
    ("planning",),
    ("training",),
    ("callbacks",),
    ("commands",),
)


def room_of(path: Path) -> str:
    """The first folder or file below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Names that a file imports, each with whether that happens inside a function only."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), inside=False))


def _imports(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module, inside
        yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
    elif isinstance(node, ast.stmt | ast.Module | ast.excepthandler | ast.match_case):  # no import in an expression
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, inside or isinstance(node, ast.FunctionDef))


def room_imports() -> dict[tuple[str, str], bool]:
    """(importer, imported) of different rooms, and whether every such import waits inside a function."""
    found: dict[tuple[str, str], bool] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, is_lazy in imports_of(path):
            parts = name.split(".")
            if parts[0] == "opd_lightning" and len(parts) > 1 and parts[1] != room_of(path):
                pair = room_of(path), parts[1]
                found[pair] = found.get(pair, True) and is_lazy
    return found


def draw(target: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "opd_lightning"
    figure, axes = pyplot.subplots(figsize=(7.5, 6.5))
    places = {
        room: ((column + 0.5) / len(row) * 3, height)
        for height, row in enumerate(ROOMS)
        for column, room in enumerate(row)
    }
    for (importer, imported), is_lazy in sorted(room_imports().items()):
        if importer in places and imported in places:
            axes.annotate(
                "",
                xy=places[imported],
                xytext=places[importer],
                arrowprops={
                    "arrowstyle": "->",
                    "color": "#7a8ca5",
                    "alpha": 0.7,
                    "linestyle": ":" if is_lazy else "-",
                    "shrinkA": 14,
                    "shrinkB": 14,
                },
            )
    for room, (x, y) in places.items():
        axes.text(
            x, y, room, ha="center", va="center", bbox={"boxstyle": "round,pad=0.4", "fc": "#eef3fa", "ec": "#33507a"}
        )
    axes.set_xlim(0, 3)
    axes.set_ylim(-0.6, len(ROOMS) - 0.4)
    axes.axis("off")
    figure.savefig(target, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(__file__).with_name("imports.svg"))
