"""A report on runs as one page that needs nothing beside itself, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from opd_lightning.reports.contents import Panel
from opd_lightning.reports.files import templates, write_json, write_text
from opd_lightning.reports.plots import COLOURS, Drawing, can_draw, draw_alone
from opd_lightning.reports.token_view import Fragment
from opd_lightning.reports.training_runs.folder import Run
from opd_lightning.reports.training_runs.report import RunReport, as_json, make_report


def write_report(
    folder: Path, runs: Sequence[Run], *, refresh_seconds: int | None = None, fragments: Sequence[Fragment] = ()
) -> RunReport:
    """Write `report.html` and `report.json` into a folder, each replaced as a whole.

    Args:
        folder: Made if need be.
        runs: What to show.
        refresh_seconds: The page loads itself anew so often; None for a page that will not change.
        fragments: Further parts of the page.
    """
    report = make_report(runs)
    write_text(folder / "report.html", render_page(report, refresh_seconds=refresh_seconds, fragments=fragments))
    write_json(folder / "report.json", as_json(runs))
    return report


def render_page(report: RunReport, *, refresh_seconds: int | None = None, fragments: Sequence[Fragment] = ()) -> str:
    """The page as text; see `write_report`."""
    page = templates().get_template("run.html.jinja")
    drawings = [
        [_drawn(panel, f"p{number}-{place}") for place, panel in enumerate(section.panels)] if can_draw() else []
        for number, section in enumerate(report.sections)
    ]
    return page.render(
        report=report,
        drawings=drawings,
        can_draw=can_draw(),
        colours=COLOURS,
        refresh_seconds=refresh_seconds,
        fragments=[(title, Markup(html)) for title, html in fragments],
    )


def _drawn(panel: Panel, prefix: str) -> tuple[Panel, Markup, str]:
    """The panel, its drawing, and the points that a reader may ask for."""
    drawing = draw_alone(panel, prefix)
    assert drawing is not None, "asked for without matplotlib"
    return panel, Markup(drawing.svg), json.dumps(_points(panel, drawing, prefix))


def _points(panel: Panel, drawing: Drawing, prefix: str) -> dict[str, Any]:
    curves = [
        {
            "label": curve.label,
            "run": curve.run,
            "xs": [_short(x) for x in curve.xs],
            "ys": [_short(y) for y in curve.ys],
        }
        for curve in panel.curves
    ]
    return {"prefix": prefix, "box": [_short(x) for x in drawing.box], "limits": list(drawing.limits), "curves": curves}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
