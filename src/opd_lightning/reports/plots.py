"""Curves as SVG, drawn by matplotlib where it is installed; their numbers are in the tables anyway."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from opd_lightning.reports.contents import Curve, Panel

# readable on white and on near-black alike
COLOURS = ("#3b82c4", "#d9772b", "#3f9b5c", "#b0569e", "#8a7a2e", "#c0504d", "#4d9aa8", "#7f7f9f")
SHADE = "#3f9b5c"
DASHES: Sequence[Any] = ("-", (0, (4, 2)), (0, (1, 1.5)))
_INK = "#010203"  # stands for the colour of the page's text
_WIDTH, _HEIGHT = 8.0, 2.9  # inches of one panel
_MOST_MARKERS = 40  # points of a curve that are drawn one by one


@dataclass(frozen=True)
class Drawing:
    """A panel as SVG, and where in it the axes are.

    Attributes:
        svg: The element, for inside a page.
        box: Left, right, top and bottom of the axes, as shares of the drawing.
        limits: Values of x at the left and right.
    """

    svg: str
    box: tuple[float, float, float, float]
    limits: tuple[float, float]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(panels: Sequence[Panel], prefix: str = "") -> str | None:
    """All panels below each other as one inline SVG in the colours of the page; None without matplotlib or panels.

    Args:
        panels: What to draw.
        prefix: Begins the ids inside, which have to differ from those of other drawings on the page; empty for none.
    """
    if not panels or not can_draw():
        return None
    with _style():
        figure = _figure(_WIDTH, _HEIGHT * len(panels))
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, place + 1)
            plot(axes, panel)
            axes.set_title(panel.title)
            if len(panel.curves) > 1:
                axes.legend(frameon=False)
        svg = _saved(figure)
    return _inline(svg, ", ".join(panel.title for panel in panels), prefix)


def draw_alone(panel: Panel, prefix: str) -> Drawing | None:
    """One panel without its title, for a page with many; None without matplotlib.

    Args:
        panel: What to draw.
        prefix: Begins the ids inside, which have to differ from those of other drawings on the page. The lines of
            curve i have ids that begin with ``{prefix}-curve-{i}-``.
    """
    if not can_draw():
        return None
    with _style():
        width, height = (2.9, 2.1) if panel.is_small else (5.4, 2.5)
        figure = _figure(width, height, layout=None)  # matplotlib's own layout would take half of the time
        axes = figure.add_axes(_inside(panel, width, height))
        plot(axes, panel, is_named=True)
        if len(panel.curves) > 1:
            num_columns, _ = _legend_shape(panel)
            anchor = {"bbox_to_anchor": (0, 1), "borderaxespad": 0.1, "columnspacing": 1.2}
            figure.legend(loc="upper left", ncols=num_columns, frameon=False, fontsize=8, **anchor)
        svg = _saved(figure)
        place = axes.get_position()
        limits = axes.get_xlim()
    return Drawing(_inline(svg, panel.title, prefix), (place.x0, place.x1, 1 - place.y1, 1 - place.y0), limits)


def figure_of(panel: Panel) -> Any:
    """One panel as a figure of matplotlib, black on white, for loggers that take such; None without matplotlib."""
    if not can_draw():
        return None
    with _style():
        figure = _figure(_WIDTH / 2, _HEIGHT)
        plot(axes := figure.add_subplot(), panel)
        axes.set_title(panel.title)
    return figure


def _inside(panel: Panel, width: float, height: float) -> tuple[float, float, float, float]:
    """Where the axes are in a drawing of so many inches: left, bottom, width and height as shares."""
    left, right, bottom, top = 0.74, 0.08, 0.44, 0.1
    if len(panel.curves) > 1:
        top += 0.16 * _legend_shape(panel)[1]
    return left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height


def _legend_shape(panel: Panel) -> tuple[int, int]:
    """Columns and rows of a legend whose labels fit into the width."""
    longest = max(len(curve.label) for curve in panel.curves)
    num_columns = max(1, min(len(panel.curves), 80 // (longest + 6)))
    return num_columns, -(-len(panel.curves) // num_columns)


def plot(axes: Any, panel: Panel, *, is_named: bool = False) -> None:
    """Draw a panel's curves, bands and marks on matplotlib's axes; the curves get ids if they are to be named."""
    if panel.is_stacked:
        artists = _stack(axes, panel.curves)
    else:
        artists = [_line(axes, curve, place) for place, curve in enumerate(panel.curves)]
    for place, parts in enumerate(artists if is_named else ()):
        for part, artist in enumerate(parts):
            artist.set_gid(f"curve-{place}-{part}")
    low, high = axes.get_ylim()
    for band_low, band_high in panel.bands:
        low, high = min(low, band_low), max(high, band_high)
        axes.axhspan(band_low, band_high, color=SHADE, alpha=0.14, linewidth=0)
    if panel.bands:
        margin = 0.03 * (high - low)
        axes.set_ylim(low - margin, high + margin)
    for x, y in panel.marks:
        axes.plot([x], [y], marker="o", ms=9, mfc="none", mew=1.8, color=_INK)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if all(float(x).is_integer() for curve in panel.curves for x in curve.xs):  # there is no half of a step
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.16, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, curve: Curve, place: int) -> list[Any]:
    errors: Any = curve.errors or None
    if curve.intervals:
        errors = [
            [y - low for y, (low, _) in zip(curve.ys, curve.intervals, strict=True)],
            [high - y for y, (_, high) in zip(curve.ys, curve.intervals, strict=True)],
        ]
    line, caps, bars = axes.errorbar(
        curve.xs,
        curve.ys,
        yerr=errors,
        label=curve.label,
        color=COLOURS[(place if curve.colour is None else curve.colour) % len(COLOURS)],
        linestyle=DASHES[curve.dash % len(DASHES)],
        marker="o" if len(curve.xs) <= _MOST_MARKERS else None,
        ms=3,
        lw=1.4,
    )
    return [line, *caps, *bars]


def _stack(axes: Any, curves: Sequence[Curve]) -> list[list[Any]]:
    """Parts of a whole; where a part has no point at an x of another, it is 0 there."""
    xs = sorted({x for curve in curves for x in curve.xs})
    parts = [dict(zip(curve.xs, curve.ys, strict=True)) for curve in curves]
    colours = [COLOURS[(i if curve.colour is None else curve.colour) % len(COLOURS)] for i, curve in enumerate(curves)]
    labels = [curve.label for curve in curves]
    areas = axes.stackplot(xs, *([part.get(x, 0.0) for x in xs] for part in parts), labels=labels, colors=colours)
    for area in areas:
        area.set(alpha=0.85, linewidth=0)
    axes.set_ylim(bottom=0)
    return [[area] for area in areas]


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "opd-lightning",
        "font.family": "sans-serif",
        "font.size": 9.0,
        "text.parse_math": False,  # a dollar in a name is a dollar
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(width: float, height: float, layout: Any = "constrained") -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasSVG(figure)
    return figure


def _saved(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()


def _inline(svg: str, label: str, prefix: str) -> str:
    """The drawing without prolog, addresses of namespaces and fixed size; ink becomes the colour of the text."""
    if prefix:
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).replace("xlink:href", "href")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).replace(_INK, "currentColor")
