"""A report as files: numbers as JSON, and one page that needs nothing beside itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opd_lightning.reports.contents import Report
from opd_lightning.reports.plots import draw
from opd_lightning.whole_files import written_whole


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write plain numbers; NaN and infinity are no JSON, so None has to stand for what is not known."""
    write_text(path, json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write plain rows as JSON, one a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    """Write plain settings, in their order."""
    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def write_page(path: Path, report: Report) -> None:
    """Write the page."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """The page as text: style and drawings inside, no script, no address of anything else."""
    drawing = draw(report.panels)
    page = templates().get_template("page.html.jinja")
    return page.render(report=report, drawing=None if drawing is None else Markup(drawing))


def templates() -> Environment:
    """The pages' templates; what they are given is escaped."""
    here = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # half a character of a file name, say
