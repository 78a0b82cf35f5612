"""Held-out problems: accuracy with intervals, two runs on the same problems, and which problems changed sides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_lightning.reports.contents import Statement, Table, number, share
from opd_lightning.reports.training_runs.folder import Run
from opd_lightning.reports.training_runs.measures import wilson

RIGHT = 0.5  # a problem is on the right side when more than this share of its answers is
MOST_PROBLEMS = 500  # named on a page
_NAME = re.compile(r"val/(?:(.+)/)?avg_at_(\d+)")


@dataclass(frozen=True)
class Difference:
    """Marks of two validations of the same problems.

    Attributes:
        before: Whose marks are compared with.
        after: Whose marks are compared.
        num_problems: That both have answered.
        mean: Of the marks, after minus before.
        half_width: Of its 95 % interval (1.96 standard errors of the differences, problem by problem; where these are
            all the same, 3 over the number of problems, the rule of three). None for one problem.
        gained: Problems that were wrong before and are right after, with both marks.
        lost: The other way round.
    """

    before: str
    after: str
    num_problems: int
    mean: float
    half_width: float | None
    gained: Mapping[str, tuple[float, float]]
    lost: Mapping[str, tuple[float, float]]


def difference(before: str, first: Mapping[str, float], after: str, second: Mapping[str, float]) -> Difference | None:
    """Compare the marks of the problems that are in both; None where there are none."""
    both = {uid: (first[uid], second[uid]) for uid in first if uid in second}
    if not both:
        return None
    changes = [new - old for old, new in both.values()]
    mean = sum(changes) / len(changes)
    half_width = None
    if len(changes) > 1:
        variance = sum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
        is_known = variance > 1e-12  # a few differences that happen to be alike are not certain
        half_width = 1.96 * math.sqrt(variance / len(changes)) if is_known else 3 / len(changes)
    return Difference(
        before,
        after,
        len(both),
        mean,
        half_width,
        {uid: pair for uid, pair in both.items() if pair[0] <= RIGHT < pair[1]},
        {uid: pair for uid, pair in both.items() if pair[1] <= RIGHT < pair[0]},
    )


def differences_of(runs: Sequence[Run]) -> list[Difference]:
    """Of one run: its last validation beside its first. Of several: each beside the first, at the last common step.

    Step 0 is no such step: there both are what they started from. Without another one the last of each are compared.
    """
    if len(runs) == 1:
        marks = runs[0].marks
        if len(marks) < 2:
            return []
        steps = min(marks), max(marks)
        found = [difference(f"step {steps[0]}", marks[steps[0]], f"step {steps[1]}", marks[steps[1]])]
    else:
        found = [_between(runs[0], other) for other in runs[1:]]
    return [each for each in found if each is not None]


def _between(first: Run, second: Run) -> Difference | None:
    if not (first.marks and second.marks):
        return None
    common = (first.marks.keys() & second.marks.keys()) - {0}
    steps = (max(common),) * 2 if common else (max(first.marks), max(second.marks))
    if not any(steps):
        return None
    names = [f"{run.label}, step {step}" for run, step in zip((first, second), steps, strict=True)]
    return difference(names[0], first.marks[steps[0]], names[1], second.marks[steps[1]])


def statement(found: Difference) -> Statement:
    """The difference in words."""
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    sure = found.half_width is not None and abs(found.mean) > found.half_width
    verdict = "no certain difference" if not sure else "better" if found.mean > 0 else "worse"
    return Statement(
        f"Held-out problems, {found.after} beside {found.before}: {100 * found.mean:+.1f}{width} points ({verdict})",
        (
            ("because", f"{len(found.gained)} gained, {len(found.lost)} lost, of {found.num_problems} problems"),
            (
                "rule",
                "95 % interval of the mean difference, problem by problem (1.96 standard errors; 3 / n if all equal)",
            ),
        ),
    )


def accuracy_table(runs: Sequence[Run]) -> Table | None:
    """Held-out accuracy of every validation, with intervals; of each data source too, where there are several."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        for name, values in run.series.items():
            if not (match := _NAME.fullmatch(name)):
                continue
            source = f"{match[1]}/" if match[1] else ""
            sizes = run.series.get(f"val/{source}num_problems", {})
            for step, value in values.items():
                low, high = wilson(value, sizes[step]) if sizes.get(step) and 0 <= value <= 1 else (None, None)
                passed = run.series.get(f"val/{source}pass_at_{match[2]}", {}).get(step)
                cells = (str(step), share(value), f"{share(low)} to {share(high)}", share(passed))
                size = number(sizes.get(step), 6)
                rows.append(((run.label,) if len(runs) > 1 else ()) + ((match[1] or "all",) + cells + (match[2], size)))
    if not rows:
        return None
    columns: tuple[str, ...] = ("source", "step", "right", "95 % interval", "any right", "answers each", "problems")
    columns = (("run",) if len(runs) > 1 else ()) + columns
    note = (
        "Any right: share of problems with at least one right answer. Interval: Wilson's, with each problem counted"
        " once; with several answers each it is a little too wide."
    )
    if len({row[-7] for row in rows}) == 1:  # one source
        rows = [row[:-7] + row[-6:] for row in rows]
        columns = columns[:-7] + columns[-6:]
    return Table("Validations", columns, rows, note)


def changed_table(found: Difference) -> Table | None:
    """The problems that changed sides, those lost first."""
    changed = [("lost", found.lost), ("gained", found.gained)]
    rows = [(uid, what, number(old), number(new)) for what, each in changed for uid, (old, new) in each.items()]
    if not rows:
        return None
    more = f" {len(rows) - MOST_PROBLEMS} more are in the JSON file." if len(rows) > MOST_PROBLEMS else ""
    return Table(
        f"Problems that changed sides: {found.after} beside {found.before}",
        ("problem", "now", "mark before", "mark after"),
        rows[:MOST_PROBLEMS],
        f"Right: more than half of the marks of its answers.{more}",
        is_detail=True,
    )
