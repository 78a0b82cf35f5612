"""From the files of one run, or of several, to what is shown: sections for the page, tables for the terminal, JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opd_lightning.reports.contents import Report, Section, Statement, Table, number
from opd_lightning.reports.training_runs.folder import Run
from opd_lightning.reports.training_runs.held_out import (
    accuracy_table,
    changed_table,
    differences_of,
    statement,
)
from opd_lightning.reports.training_runs.measures import (
    MEASURES,
    known_metrics,
    mean_of_steps,
    panels_of,
    thinned,
    wilson,
)
from opd_lightning.reports.training_runs.searches import MOST_DRAWN, search_panels, search_tables, searches_of
from opd_lightning.reports.training_runs.settings import differences, shown
from opd_lightning.reports.training_runs.time_spent import (
    rollouts_table,
    selection_panels,
    time_by_part,
    time_panels,
    time_table,
)

RANGES_NOTE = (
    "Shaded ranges are those of models of 1.5B to 7B, with vocabularies of 150 thousand and answers of thousands of"
    " tokens; a small pair may be healthy outside of them. Each drawing says where its range comes from."
)


@dataclass(frozen=True)
class RunReport:
    """A report on runs.

    Attributes:
        title: What it is.
        subtitle: Which runs, and how far they are.
        labels: Of the runs, in the order of their colours.
        statements: What the numbers say.
        notes: What a reader has to know of the files.
        sections: The parts, in their order.
    """

    title: str
    subtitle: str
    labels: Sequence[str]
    statements: Sequence[Statement]
    notes: Sequence[str]
    sections: Sequence[Section]

    def for_terminal(self) -> Report:
        """Its tables, without those that are for the page alone."""
        tables = [table for section in self.sections for table in section.tables if not table.is_detail]
        return Report(self.title, self.subtitle, self.statements, tables, notes=self.notes)


def make_report(runs: Sequence[Run]) -> RunReport:
    """All that is known of the runs."""
    several = len(runs) > 1
    found = differences_of(runs)
    searches = {run.label if several else "": searches_of(run) for run in runs}
    search_panel_list = [panel for label, each in searches.items() for panel in search_panels(each, label)]
    tables = [accuracy_table(runs), *(changed_table(each) for each in found)]
    sections = [
        Section("Curves", RANGES_NOTE, [panel for measure in MEASURES for panel in panels_of(measure, runs)]),
        Section("At a glance", tables=[_summary(runs)]),
        Section("Held-out problems", _marks_note(runs), tables=[table for table in tables if table is not None]),
        Section(
            "Searches along the ray",
            f"Score against factor; a ring is around what was kept. The last {MOST_DRAWN} of each run are drawn.",
            search_panel_list,
            [table for label, each in searches.items() if each for table in search_tables(each, label)],
        ),
        Section("Time and memory", "", time_panels(runs), [t for t in (time_table(runs),) if t is not None]),
        Section("Rollouts", "", selection_panels(runs), [rollouts_table(runs)]),
        Section("Settings", "", tables=_settings_tables(runs)),
    ]
    steps = ", ".join(f"{run.label}: {run.num_steps} steps" for run in runs)
    return RunReport(
        f"Comparison of {len(runs)} runs" if several else "Report of a run",
        f"{steps}.",
        [run.label for run in runs],
        [statement(each) for each in found],
        [note for run in runs for note in run.notes],
        [section for section in sections if section.panels or section.tables],
    )


def _summary(runs: Sequence[Run]) -> Table:
    if len(runs) == 1:
        run, rows = runs[0], []
        for name, metric in _rows(run):
            ends = (_mean(run, metric, last=False), _mean(run, metric, last=True))
            rows.append((name, *map(number, (*ends, *_extremes(run, metric)))))
        return Table("What matters", ("", "first", "last", "lowest", "highest"), rows, _MEANS_NOTE)
    names = {name: None for run in runs for name, _ in _rows(run)}
    columns = [{name: _mean(run, metric, last=True) for name, metric in _rows(run)} for run in runs]
    rows = [(name, *(number(column.get(name)) for column in columns)) for name in names]
    return Table("What matters, at the end", ("", *(run.label for run in runs)), rows, _MEANS_NOTE)


_MEANS_NOTE = (
    "First and last, and the end: means of 5 logged steps, of half of them where there are fewer than 10; of"
    " validations, the first and the last one."
)


def _rows(run: Run) -> list[tuple[str, str]]:
    """(name of the row, metric) of all that is summed up."""
    rows = []
    for measure in MEASURES:
        known = known_metrics(measure, run)
        rows += [(measure.title if len(known) == 1 else f"{measure.title}: {label}", name) for label, name in known]
    return rows


def _mean(run: Run, metric: str, *, last: bool) -> float | None:
    return mean_of_steps(run.series[metric], last=last, count=1 if metric.startswith("val/") else 5)


def _extremes(run: Run, metric: str) -> tuple[float | None, float | None]:
    values = [value for value in run.series[metric].values() if math.isfinite(value)]
    return min(values, default=None), max(values, default=None)


def _marks_note(runs: Sequence[Run]) -> str:
    if all(run.marks for run in runs):
        return ""
    return "Which problems changed sides is not known: the marks of single problems were not kept (HeldOutMarks)."


def _settings_tables(runs: Sequence[Run]) -> list[Table]:
    if len(runs) == 1:
        rows = [(name, shown(value)) for name, value in runs[0].settings.items()]
        return [Table("All settings", ("setting", "value"), rows, is_detail=True)] if rows else []
    without = [run.label for run in runs if not run.settings]
    if without:
        return [
            Table("What differs", ("setting",), (), f"Not known: no config.yaml in the folder of {', '.join(without)}.")
        ]
    found = differences([run.settings for run in runs])
    note = "By dotted name, from each run's config.yaml; a dash where a run has no such setting."
    return [Table("What differs", ("setting", *(run.label for run in runs)), [(k, *v) for k, v in found.items()], note)]


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Every number, plain; None for what is not known or not finite. Long curves are thinned as on the page."""
    plain = {
        "version": 1,
        "runs": [_plain(run) for run in runs],
        "settings_that_differ": differences([run.settings for run in runs]),
        "held_out_differences": [asdict(each) for each in differences_of(runs)],
    }
    known: dict[str, Any] = _finite(plain)
    return known


def _plain(run: Run) -> dict[str, Any]:
    curves = {name: thinned(series) for name, series in run.series.items()}
    sizes = run.series.get("val/num_problems", {})
    return {
        "label": run.label,
        "folder": str(run.folder),
        "num_steps": run.num_steps,
        "notes": run.notes,
        "summary": {
            metric: {"first": _mean(run, metric, last=False), "last": _mean(run, metric, last=True)}
            for _, metric in _rows(run)
        },
        "held_out": [
            {"metric": name, "step": step, "value": value, "interval": wilson(value, sizes[step])}
            for name, series in run.series.items()
            if name.startswith("val/avg_at_")
            for step, value in series.items()
            if sizes.get(step) and 0 <= value <= 1
        ],
        "searches": [asdict(each) | {"outcome": each.words} for each in searches_of(run)],
        "time": [asdict(each) for each in time_by_part(run)],
        "curves": {name: {"steps": xs, "values": ys} for name, (xs, ys) in curves.items()},
        "settings": run.settings,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)  # YAML knows dates
