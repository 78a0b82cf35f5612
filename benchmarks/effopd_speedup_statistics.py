"""Runs of effopd_speedup.py as rows of a table: cost to the bar, intervals, speed-ups paired by seed."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from effopd_speedup_arms import TARGETS

LOW_COSINE = 0.7
COSTS = ("steps", "seconds", "tokens")
T_QUANTILE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
}


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
    quantile = T_QUANTILE[len(values) - 1]
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def find_finish(run: dict[str, Any], prefix: str) -> Finish:
    """The first evaluation at or below the divergence bar and at or above the accuracy bar."""
    bar = TARGETS[run["settings"].get("target", "near")]
    for point in run["trajectory"]:
        if point[f"{prefix}kl"] <= bar.kl and point[f"{prefix}accuracy"] >= bar.accuracy:
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


def separation(pairs: Sequence[tuple[float, bool]]) -> tuple[float, int]:
    """How often a success has the larger number of a success and a failure (ties count half), and of how many pairs."""
    successes = [number for number, success in pairs if success]
    failures = [number for number, success in pairs if not success]
    num_pairs = len(successes) * len(failures)
    won = sum((a > b) + 0.5 * (a == b) for a in successes for b in failures)
    return (won / num_pairs if num_pairs else math.nan), num_pairs


def describe_cosines(runs: Sequence[dict[str, Any]]) -> str:
    """Whether the cosine of two consecutive Deltas tells beforehand that a search will go forward."""
    by_arm: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for run in runs:
        if not run["arm"].startswith(("alphaopd", "always-back")):
            known = [search for search in run["searches"] if not math.isnan(search["cosine"])]
            by_arm[run["arm"]] += [(search["cosine"], search["best"]["factor"] > 0) for search in known]
    pooled = [pair for pairs in by_arm.values() for pair in pairs]
    within = [(share, count) for share, count in map(separation, by_arm.values()) if count]
    total = sum(count for _, count in within)
    below = [success for cosine, success in pooled if cosine < LOW_COSINE]
    num_forward = sum(success for _, success in pooled)
    failures, successes = below.count(False) / (len(pooled) - num_forward), below.count(True) / num_forward
    return (
        f"{len(pooled)} searches with a cosine, {num_forward} went forward. The cosine was larger for the one that did"
        f" in {separation(pooled)[0]:.0%} of all pairs, and in"
        f" {sum(share * count for share, count in within) / total:.0%} of the pairs within an arm (50 %: no help)."
        f" Below {LOW_COSINE}: {failures:.0%} of the searches that did not go forward,"
        f" {successes:.0%} of those that did."
    )
