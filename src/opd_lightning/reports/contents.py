"""What a report is made of, whoever shows it: words, tables and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Statement:
    """A conclusion and what it stands on.

    Attributes:
        words: The conclusion.
        grounds: (name, text) pairs: why, by which rule, from which source.
    """

    words: str
    grounds: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first column names the row.

    Attributes:
        title: Above it.
        columns: Their heads.
        rows: As many cells each.
        note: How to read it.
        is_detail: For the page alone, folded there.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_detail: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points.

    Attributes:
        label: In the legend.
        xs: Where.
        ys: How much.
        errors: Half-lengths of error bars; empty for none.
        intervals: Lower and upper ends of error bars, where they are not symmetric; empty for none.
        colour: Which of the colours; None takes the next one.
        dash: Which of the kinds of line.
        run: Of which run the reader may hide it with; None for none.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()
    intervals: Sequence[tuple[float, float]] = field(default=(), kw_only=True)
    colour: int | None = field(default=None, kw_only=True)
    dash: int = field(default=0, kw_only=True)
    run: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Panel:
    """Curves on common axes.

    Attributes:
        title: Above it.
        x_label: What is to the right.
        y_label: What is up.
        curves: The lines.
        bands: (from, to) of what is shaded, such as a healthy range.
        marks: Points that stand out.
        is_stacked: The curves are parts of a whole, drawn on top of each other.
        is_small: A quarter of a page's width will do.
        note: Below it: what the shade means, and its source.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    bands: Sequence[tuple[float, float]] = ()
    marks: Sequence[tuple[float, float]] = ()
    is_stacked: bool = False
    is_small: bool = False
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A passage that is shown as it is, line breaks included."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of a long report, which has a heading of its own.

    Attributes:
        title: The heading.
        note: Below it.
        panels: Drawings.
        tables: What they show, and more.
    """

    title: str
    note: str = ""
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """All of it, in the order in which it is shown."""

    title: str
    subtitle: str
    statements: Sequence[Statement]
    tables: Sequence[Table]
    panels: Sequence[Panel] = field(default_factory=tuple)
    texts: Sequence[Text] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash for None."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """A share as a percentage; a dash for None."""
    return "-" if value is None else f"{value:.1%}"
