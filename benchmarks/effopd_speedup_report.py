"""Turn the runs of effopd_speedup.py into a table (standard output) and docs/effopd_speedup.png.

Seconds are processor seconds of the single-threaded process: what a wall clock shows on an idle core, whatever else the
machine was doing. Means carry a 95 % t-interval over seeds. Speed-ups are paired by seed (same prompts, same samples of
the first step), averaged as logarithms. A baseline that never reached the bar counts with its end ("at least").
The second table asks the same for looser bars on the divergence alone: plain runs are interpolated between evaluations
(linear in the logarithm), runs with searches are not, which favours the plain ones.

Command: python benchmarks/effopd_speedup_report.py [RESULTS_JSONL]
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "effopd_speedup_cpu-2core.jsonl"
COLORS = ("tab:gray", "tab:orange", "tab:blue", "tab:green")
CAUTIOUS = {
    "opd": "plain OPD",
    "effopd-accuracy": "EffOPD as in the paper (accuracy)",
    "effopd-kl": "EffOPD, TeacherKL",
    "effopd-fixed": "EffOPD, TeacherKLOnFixedRollouts",
}
PANELS = {
    "rate 5e-5": {f"{method} lr=5e-05 prompts=64": label for method, label in CAUTIOUS.items()},
    "rate 1e-4": {f"{method} lr=0.0001 prompts=64": label for method, label in CAUTIOUS.items()},
    "tuned rates": {
        "opd lr=0.0005 prompts=64": "plain OPD, 5e-4",
        "two-sided-kl lr=0.0005 prompts=64": "two-sided, TeacherKL, 5e-4",
        "opd lr=0.001 prompts=64 warmup=4 decay=24": "plain OPD, 1e-3 with warm-up and decay",
        "two-sided-kl lr=0.001 prompts=64": "two-sided, TeacherKL, 1e-3",
    },
}
LEVELS = (0.15, 0.1, 0.07, 0.05, 0.035)
COSTS = ("steps", "seconds", "tokens")
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Finish:
    """What one read-out of one run had cost when it reached the bar, or at its end."""

    reached: bool
    steps: float
    seconds: float
    tokens: float


@dataclass(frozen=True)
class Row:
    """One arm, read in one way.

    Attributes:
        name: Arm and read-out.
        settings: As recorded.
        finishes: By seed.
        search_share: Mean share of the training time that searches took.
    """

    name: str
    settings: dict[str, Any]
    finishes: dict[int, Finish]
    search_share: float

    @property
    def is_plain(self) -> bool:
        """Whether it is OPD without searches."""
        return bool(self.settings["method"] == "opd")

    @property
    def always_reached(self) -> bool:
        """Whether every seed reached the bar."""
        return all(finish.reached for finish in self.finishes.values())

    def mean(self, cost: str) -> float:
        """Mean cost over seeds."""
        return statistics.fmean(getattr(finish, cost) for finish in self.finishes.values())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval; NaN with fewer than two values."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    quantile = T_QUANTILE.get(len(values) - 1, 2.23)
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def find_finish(run: dict[str, Any], prefix: str) -> Finish:
    """The first evaluation at or below the divergence bar and at or above the accuracy bar."""
    bar = run["settings"]["bar"]
    for point in run["trajectory"]:
        if point[f"{prefix}kl"] <= bar["kl"] and point[f"{prefix}accuracy"] >= bar["accuracy"]:
            return Finish(True, point["step"], point["seconds"], point["tokens"])
    point = run["trajectory"][-1]
    return Finish(False, point["step"], point["seconds"], point["tokens"])


def read_rows(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per arm, and another for its averaged weights where they were evaluated."""
    by_arm = defaultdict(list)
    for run in runs:
        by_arm[run["arm"]].append(run)
    rows = []
    for arm, members in by_arm.items():
        settings = members[0]["settings"]
        shares = [
            sum(search["seconds"] for search in run["searches"]) / run["trajectory"][-1]["wall_seconds"]
            for run in members
        ]
        for prefix in ("", "averaged_") if settings["averaged"] else ("",):
            finishes = {run["seed"]: find_finish(run, prefix) for run in members}
            name = f"{arm} averaged" if prefix else arm
            rows.append(Row(name, settings, finishes, statistics.fmean(shares)))
    return sorted(rows, key=lambda row: (row.settings["prompts"], row.settings["lr"], not row.is_plain, row.name))


def describe_cost(row: Row, cost: str) -> str:
    """Mean and interval over the seeds that reached the bar."""
    values = [getattr(finish, cost) for finish in row.finishes.values() if finish.reached]
    if not values:
        return "-"
    mean, half = interval(values)
    scale, digits = (1000, 1) if cost == "tokens" else (1, 1)
    return f"{mean / scale:.{digits}f}" + ("" if math.isnan(half) else f" ± {half / scale:.{digits}f}")


def describe_speedup(baseline: Row | None, row: Row, cost: str) -> str:
    """Geometric mean of baseline / row over common seeds, with its interval."""
    if baseline is None or baseline is row:
        return "-"
    seeds = sorted(baseline.finishes.keys() & row.finishes.keys())
    seeds = [seed for seed in seeds if row.finishes[seed].reached]
    if not seeds:
        return "-"
    pairs = [(baseline.finishes[seed], row.finishes[seed]) for seed in seeds]
    mean, half = interval([math.log(getattr(plain, cost) / getattr(finish, cost)) for plain, finish in pairs])
    text = ">= " if not all(plain.reached for plain, _ in pairs) else ""
    text += f"{math.exp(mean):.2f}"
    return text if math.isnan(half) else f"{text} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"


def same_rate(row: Row, rows: Sequence[Row]) -> Row | None:
    """Plain OPD, read without averaging, with the settings of this row."""
    keys = ("lr", "prompts", "warmup", "decay")
    plain = [other for other in rows if other.is_plain and not other.name.endswith("averaged")]
    matches = [other for other in plain if all(other.settings[key] == row.settings[key] for key in keys)]
    return matches[0] if matches else None


def best_plain(row: Row, rows: Sequence[Row]) -> Row | None:
    """Among plain read-outs that always reached the bar with this many prompts, that of the fewest mean seconds."""
    plain = [other for other in rows if other.is_plain and other.settings["prompts"] == row.settings["prompts"]]
    return min(
        (other for other in plain if other.always_reached), key=lambda other: other.mean("seconds"), default=None
    )


def print_table(rows: Sequence[Row]) -> None:
    """A Markdown table."""
    columns = ["arm", "reached", "steps", "seconds", "1000 tokens", "searching"]
    columns += ["speed-up over OPD at this rate: steps", "seconds", "over the best plain: steps", "seconds"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        rate, best = same_rate(row, rows), best_plain(row, rows)
        cells = [row.name, f"{sum(f.reached for f in row.finishes.values())}/{len(row.finishes)}"]
        cells += [describe_cost(row, cost) for cost in COSTS]
        cells.append("-" if row.is_plain else f"{row.search_share:.0%}")
        cells += [describe_speedup(base, row, cost) for base in (rate, best) for cost in ("steps", "seconds")]
        print("| " + " | ".join(cells) + " |")
    for prompts in sorted({row.settings["prompts"] for row in rows}):
        best = best_plain(next(row for row in rows if row.settings["prompts"] == prompts), rows)
        print(f"\nBest plain at {prompts} prompts a step: {best.name if best else 'none reached the bar every time'}")


def cost_at_level(run: dict[str, Any], level: float, cost: str) -> float | None:
    """Cost when the divergence first was at or below the level; None when it never was."""
    points = run["trajectory"]
    for before, after in pairwise(points):
        if after["kl"] <= level:
            share = 1.0
            if run["settings"]["method"] == "opd":
                share = math.log(before["kl"] / level) / math.log(before["kl"] / after["kl"])
            return float(before[cost] + share * (after[cost] - before[cost]))
    return None


def print_levels(runs: Sequence[dict[str, Any]]) -> None:
    """Speed-up in processor seconds over plain OPD at the same rate, for looser bars."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        by_arm[run["arm"]][run["seed"]] = run
    print("\n| seconds to reach a divergence, as speed-up | " + " | ".join(map(str, LEVELS)) + " |")
    print("|" + "---|" * (1 + len(LEVELS)))
    for arm, members in sorted(by_arm.items()):
        plain = by_arm.get(arm.replace(arm.split()[0], "opd", 1))
        if plain is None or plain is members:
            continue
        cells = []
        for level in LEVELS:
            seeds = plain.keys() & members.keys()
            pairs = [[cost_at_level(of[seed], level, "seconds") for of in (plain, members)] for seed in seeds]
            ratios = [math.log(a / b) for a, b in pairs if a is not None and b is not None]
            mean, half = interval(ratios) if ratios else (math.nan, math.nan)
            spread = "" if math.isnan(half) else f" [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"
            cells.append(f"{math.exp(mean):.2f}{spread}" if ratios else "-")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence against steps, seconds and tokens, one line per run, one row of panels per learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PANELS), 3, figsize=(11, 3 * len(PANELS)), layout="constrained", sharey=True)
    for (title, arms), line in zip(PANELS.items(), axes, strict=True):
        for (arm, label), color in zip(arms.items(), COLORS, strict=False):
            for i, run in enumerate(run for run in runs if run["arm"] == arm):
                for axis, cost in zip(line, ("step", "seconds", "tokens"), strict=True):
                    costs = [point[cost] for point in run["trajectory"]]
                    divergences = [point["kl"] for point in run["trajectory"]]
                    axis.plot(costs, divergences, color=color, alpha=0.6, linewidth=1.2, label=None if i else label)
        for axis, cost in zip(line, ("optimiser steps", "processor seconds", "generated tokens"), strict=True):
            axis.axhline(runs[0]["settings"]["bar"]["kl"], color="black", linewidth=0.8, linestyle=":")
            axis.set(yscale="log", xlabel=cost)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"{title}\nheld-out reverse KL (nats per token)")
        line[0].legend(fontsize=7)
    figure.suptitle("searches included; the dotted line is the bar")
    figure.savefig(path, dpi=110)


def main(path: Path = RESULTS) -> None:
    """Print the table and draw."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    print_table(read_rows(runs))
    print_levels(runs)
    draw(runs, ROOT / "docs" / "effopd_speedup.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
