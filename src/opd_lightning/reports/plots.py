"""Curves as SVG, drawn by matplotlib where it is installed; their numbers are in the tables anyway."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from typing import Any

from opd_lightning.reports.contents import Panel

COLOURS = ("#3b82c4", "#d9772b", "#3f9b5c", "#b0569e")  # readable on white and on near-black alike
_INK = "#010203"  # stands for the colour of the page's text
_WIDTH, _HEIGHT = 8.0, 2.9  # inches of one panel


def draw(panels: Sequence[Panel]) -> str | None:
    """All panels below each other as one inline SVG in the colours of the page; None without matplotlib or panels."""
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "opd-lightning",
        "font.family": "sans-serif",
        "font.size": 9.0,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT * len(panels)), layout="constrained")
        FigureCanvasSVG(figure)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, place + 1)
            for curve, colour in zip(panel.curves, COLOURS, strict=False):
                axes.errorbar(
                    curve.xs, curve.ys, yerr=curve.errors or None, label=curve.label, color=colour, marker="o", ms=3
                )
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.grid(alpha=0.25, color=_INK)
            axes.spines[["top", "right"]].set_visible(False)
            if len(panel.curves) > 1:
                axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(file.getvalue(), ", ".join(panel.title for panel in panels))


def _inline(svg: str, label: str) -> str:
    """The drawing without prolog, addresses of namespaces and fixed size; ink becomes the colour of the text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).replace("xlink:href", "href")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).replace(_INK, "currentColor")
