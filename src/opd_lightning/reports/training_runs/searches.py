"""Searches of a run (EffOPD, the line search for the learning rate): scores along the ray, and what was kept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from opd_lightning.reports.contents import Curve, Panel, Table, number
from opd_lightning.reports.training_runs.folder import Run

MOST_DRAWN = 16
_EFFOPD = re.compile(r"(effopd(?:/[^/]+)?)/score_before")
RATE = "learning_rate_search"
_RATE = re.compile(rf"({RATE})/score_before_step")


@dataclass(frozen=True)
class Search:
    """One search along a ray.

    Attributes:
        who: Which callback: "effopd", "effopd/NAME" or `RATE`.
        step: Optimiser steps made when it ran.
        standing: Score where it began.
        trials: (factor, score) of every candidate, by factor.
        kept: Factor of the point kept; 0 where nothing moved, None where it is not recorded.
        score: Score of the point kept.
        delta_norm: Length of the direction; None where there is none.
        cosine: Of the direction with that of the search before; None for the first.
        seconds: Wall-clock time.
        tokens: Tokens spent on scores.
    """

    who: str
    step: int
    standing: float
    trials: tuple[tuple[float, float], ...]
    kept: float | None
    score: float | None
    delta_norm: float | None
    cosine: float | None
    seconds: float
    tokens: float

    @property
    def words(self) -> str:
        """What was kept, in words."""
        if self.kept is None:
            return "not recorded"
        if self.kept == 0:
            return "nothing moved"
        return f"kept {self.kept:+g} Delta" if self.who != RATE else f"kept {self.kept:.3g} times the step"


def searches_of(run: Run) -> list[Search]:
    """All searches that the run recorded, in the order of steps."""
    found = []
    for name, standing in run.series.items():
        match = _EFFOPD.fullmatch(name) or _RATE.fullmatch(name)
        if match:
            found += [_search(run, match[1], step, value) for step, value in standing.items()]
    return sorted(found, key=lambda each: (each.step, each.who))


def _search(run: Run, who: str, step: int, standing: float) -> Search:
    def at(name: str) -> float | None:
        return run.series.get(f"{who}/{name}", {}).get(step)

    prefix = f"{who}/score_at/"
    trials = sorted(
        (float(name.removeprefix(prefix)), values[step])
        for name, values in run.series.items()
        if name.startswith(prefix) and step in values
    )
    kept, score = at("factor"), at("score_after")
    if who == RATE:  # its factor is that of the rate, which in a warm-up is not that of the step
        kept = at("scale")
    return Search(
        who,
        step,
        standing,
        tuple(trials),
        kept,
        score,
        at("delta_norm"),
        at("cosine"),
        at("seconds") or 0.0,
        at("tokens") or 0.0,
    )


def search_panels(searches: Sequence[Search], label: str = "") -> list[Panel]:
    """A small drawing of each of the last searches: score by factor, with a ring around what was kept."""
    drawn = [each for each in searches if each.trials and math.isfinite(each.standing)][-MOST_DRAWN:]
    panels = []
    for search in drawn:
        points = [(x, y) for x, y in sorted([(0.0, search.standing), *search.trials]) if math.isfinite(y)]
        marks = [
            point for point in points if search.kept is not None and math.isclose(point[0], search.kept, rel_tol=1e-4)
        ]
        title = f"{label + ', ' if label else ''}step {search.step}: {search.words}"
        curve = Curve("score", [x for x, _ in points], [y for _, y in points])
        x_label = "times the step" if search.who == RATE else "times Delta"
        panels.append(Panel(title, x_label, "score", [curve], marks=marks, is_small=True))
    return panels


def search_tables(searches: Sequence[Search], label: str = "") -> list[Table]:
    """Every search in a row, and every score that was taken."""
    of = f" of {label}" if label else ""
    rows = [
        (
            str(each.step),
            each.who,
            each.words,
            number(each.standing),
            number(each.score),
            number(each.cosine, 2),
            number(each.seconds),
            f"{each.tokens:.0f}",
        )
        for each in searches
    ]
    columns = ("step", "search", "outcome", "before", "after", "cosine", "seconds", "tokens")
    note = (
        "Scores before and after: higher is better. Delta is the change of the weights since the search before. Cosine:"
        " of this Delta with the one before."
    )
    tried = [
        (str(each.step), each.who, f"{factor:g}", f"{score:.6g}", "kept" if _is_kept(each, factor) else "")
        for each in searches
        for factor, score in sorted([(0.0, each.standing), *each.trials])
    ]
    every = Table(f"Every score{of}", ("step", "search", "factor", "score", "outcome"), tried, is_detail=True)
    return [Table(f"Searches{of}", columns, rows, note), every]


def _is_kept(search: Search, factor: float) -> bool:
    """Whether this is the point that stayed; names of metrics hold six digits of a factor."""
    return search.kept is not None and math.isclose(factor, search.kept, rel_tol=1e-4)
