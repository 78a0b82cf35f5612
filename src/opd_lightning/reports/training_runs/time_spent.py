"""Where a run's time and memory went, by part of the step, and what became of its rollouts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from opd_lightning.reports.contents import Curve, Panel, Table, number, share
from opd_lightning.reports.training_runs.folder import Run, Series
from opd_lightning.reports.training_runs.measures import (
    MEMORY,
    MEMORY_BY_PART,
    SPEED,
    TIME_PARTS,
    X_LABEL,
    panels_of,
    thinned,
)
from opd_lightning.reports.training_runs.searches import searches_of

SEARCHES = "searches"


@dataclass(frozen=True)
class PartOfTime:
    """Seconds of one part of the steps.

    Attributes:
        part: Its name.
        total: Over all steps; those that were not logged count like those that were.
        per_step: Mean over the run's steps.
        of_steps: Share of the time of all parts.
    """

    part: str
    total: float
    per_step: float
    of_steps: float


def time_by_part(run: Run) -> list[PartOfTime]:
    """Seconds of the parts that a step waits for, in their order, and those of searches after it."""
    seconds = _seconds(run)
    totals = {part: sum(value for value in series.values() if math.isfinite(value)) for part, series in seconds.items()}
    logged = {step for part, series in seconds.items() if part != SEARCHES for step in series}
    every = steps_between(logged)
    totals = {part: total if part == SEARCHES else every * total for part, total in totals.items()}
    whole, num_steps = sum(totals.values()), every * len(logged) or len(seconds.get(SEARCHES, ()))
    return [
        PartOfTime(part, total, total / num_steps, total / whole if whole else 0.0) for part, total in totals.items()
    ]


def steps_between(logged: Collection[int]) -> float:
    """Steps from one that was logged to the next, in the mean: `log_every_n_steps`; 1 where there is no next."""
    return (max(logged) - min(logged)) / (len(logged) - 1) if len(logged) > 1 else 1.0


def _seconds(run: Run) -> dict[str, Series]:
    known = {part: run.series[f"train/seconds/{part}"] for part in TIME_PARTS if f"train/seconds/{part}" in run.series}
    if "wait" in known:  # generation went on during the step before; what the step waited for counts
        known.pop("generate", None)
    spent: dict[int, float] = {}
    for search in searches_of(run):
        step = max(search.step - 1, 0)  # it belongs to the step that was just made
        spent[step] = spent.get(step, 0.0) + search.seconds
    return known | ({SEARCHES: spent} if spent else {})


def time_panels(runs: Sequence[Run]) -> list[Panel]:
    """Seconds of each step: by part for one run, in all for several; speed and memory."""
    note = "Wall-clock seconds, mean over processes. Validations, checkpoints and what callbacks do are not in them."
    panels = []
    if len(runs) == 1:
        curves = [
            Curve(part, *thinned(series), colour=place)
            for place, (part, series) in enumerate(_by_step(runs[0]).items())
        ]
        if any(curve.xs for curve in curves):
            panels.append(Panel("Time of a step", X_LABEL, "seconds", curves, is_stacked=True, note=note))
    else:
        curves = [
            Curve(run.label, *thinned(whole), colour=place, run=place)
            for place, run in enumerate(runs)
            if (whole := _whole(_by_step(run)))
        ]
        if curves:
            panels.append(Panel("Time of a step", X_LABEL, "seconds", curves, note=note))
    return [*panels, *panels_of(SPEED, runs), *panels_of(MEMORY_BY_PART, runs), *panels_of(MEMORY, runs)]


def _by_step(run: Run) -> Mapping[str, Series]:
    """Seconds of all parts at the same steps, for drawings on top of each other that are thinned alike.

    A search counts at the first logged step from its own on, for its share of the steps since the one before.
    """
    seconds = _seconds(run)
    steps = sorted({step for part, series in seconds.items() if part != SEARCHES for step in series})
    if not steps:
        return seconds
    found = {part: {step: series.get(step, 0.0) for step in steps} for part, series in seconds.items()}
    if SEARCHES in seconds:
        found[SEARCHES] = dict.fromkeys(steps, 0.0)
        for step, spent in seconds[SEARCHES].items():
            place = min(bisect_left(steps, step), len(steps) - 1)
            found[SEARCHES][steps[place]] += spent / steps_between(steps)
    return found


def _whole(seconds: Mapping[str, Series]) -> dict[int, float]:
    steps = sorted({step for series in seconds.values() for step in series})
    return {step: sum(series.get(step, 0.0) for series in seconds.values()) for step in steps}


def time_table(runs: Sequence[Run]) -> Table | None:
    """Seconds per step of each part, and its share."""
    several = len(runs) > 1
    rows: list[tuple[str, ...]] = []
    for run in runs:
        for each in time_by_part(run):
            cells = (each.part, number(each.per_step), share(each.of_steps), number(each.total, 4))
            rows.append(((run.label,) if several else ()) + cells)
    if not rows:
        return None
    columns: tuple[str, ...] = ("part", "seconds per step", "share", "seconds in all")
    note = (
        "Wait: for rollouts that were generated ahead. Searches: of EffOPD and for the learning rate. Steps that were"
        " not logged (trainer.log_every_n_steps) are taken to be like those that were."
    )
    return Table("Time by part", (("run",) if several else ()) + columns, rows, note)


_MEANS = (
    ("answers cut at max_new_tokens", "train/truncation_rate"),
    ("answers cut at the horizon", "train/horizon_cut_rate"),
    ("padded tokens of all that went through the student", "train/padding_share"),
)


def rollouts_table(runs: Sequence[Run]) -> Table:
    """How many rollouts were trained on, and what was cut, reused or skipped; a column for each run."""
    columns = [_rollouts(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "-") for column in columns)) for name in names]
    note = "Rollouts per step: prompts_per_step times rollouts_per_prompt. Selection: what the prompt selector logs."
    heads = [run.label for run in runs] if len(runs) > 1 else ["value"]
    return Table("Rollouts kept and skipped", ("", *heads), rows, note)


def _rollouts(run: Run) -> dict[str, str]:
    found = {"steps made": str(run.num_steps)}
    skipped = run.series.get("train/skipped_steps")
    if skipped:
        found["steps skipped for a gradient that was not finite"] = f"{max(skipped.values()):.0f}"
    prompts, each = run.settings.get("data.prompts_per_step"), run.settings.get("data.rollouts_per_prompt")
    if isinstance(prompts, int) and isinstance(each, int):
        found["rollouts per step"] = f"{prompts * each}"
    if rounds := run.series.get("train/round"):
        num_rounds = 1 + max(rounds.values()) - min(rounds.values())  # not all of them need have been logged
        found["rounds of rollouts generated"] = f"{num_rounds:.0f}"
        found["steps per round, mean"] = number(len(rounds) * steps_between(rounds) / num_rounds)
        if passes := run.series.get("train/pass"):
            found["passes over a round, at most"] = f"{1 + max(passes.values()):.0f}"
    if staleness := run.series.get("train/staleness"):
        found["staleness in steps, largest"] = f"{max(staleness.values()):.0f}"
    for words, name in _MEANS:
        if values := [value for value in run.series.get(name, {}).values() if math.isfinite(value)]:
            found[words] = share(sum(values) / len(values))
    for name, series in run.series.items():
        if name.startswith("selection/"):
            found[f"selection: {name.removeprefix('selection/').replace('_', ' ')}, at the end"] = number(
                series[max(series)]
            )
    return found


def selection_panels(runs: Sequence[Run]) -> list[Panel]:
    """What the prompt selector logs, and the staleness of rollouts where it is not always 0."""
    names = sorted({name for run in runs for name in run.series if name.startswith("selection/")})
    if any(any(run.series.get("train/staleness", {}).values()) for run in runs):
        names.append("train/staleness")
    several, panels = len(runs) > 1, []
    for name in names:
        curves = [
            Curve(
                run.label if several else "value",
                *thinned(run.series[name]),
                colour=place,
                run=place if several else None,
            )
            for place, run in enumerate(runs)
            if name in run.series
        ]
        panels.append(Panel(name.partition("/")[2].replace("_", " ").capitalize(), X_LABEL, "", curves))
    return panels
