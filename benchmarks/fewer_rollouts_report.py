"""Tables of fewer_rollouts.py: what each arm had cost when it reached the bar.

Hardware: any.
Command:  python benchmarks/fewer_rollouts_report.py
"""

import json
import statistics
from collections import defaultdict
from typing import Any

from effopd_speedup_statistics import interval
from fewer_rollouts import RESULTS

COSTS = ("rounds", "rollouts", "tokens", "updates", "seconds")
SHARES = (0.5, 0.75, 0.9)  # of a plain step, that generation is supposed to take


def finish(run: dict[str, Any]) -> dict[str, float] | None:
    """The first point at the bar; None where the run never got there."""
    bar = run["settings"]["bar"]
    points = run["trajectory"]
    return next((p for p in points if p["kl"] <= bar["kl"] and p["accuracy"] >= bar["accuracy"]), None)


def describe(values: list[float], digits: int = 0) -> str:
    """Mean and half width of the 95 % t-interval."""
    mean, half = interval(values)
    return f"{mean:,.{digits}f}" + ("" if len(values) < 2 else f" ± {half:,.{digits}f}")


def seconds_per_token(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Of plain runs: everything else, and generation, per generated token."""
    ends = [run["trajectory"][-1] for run in runs]
    rest = statistics.fmean((end["seconds"] - end["generation_seconds"]) / end["tokens"] for end in ends)
    return rest, statistics.fmean(end["generation_seconds"] / end["tokens"] for end in ends)


def table(target: str, runs: list[dict[str, Any]]) -> str:
    """One row for each arm with this bar, and what seconds would be if generation were slower."""
    by_arm = defaultdict(list)
    for run in runs:
        if run["settings"]["target"] == target:
            by_arm[run["arm"]].append(run)
    plain = [run for members in by_arm.values() for run in members if " U=" not in run["arm"]]
    rest, generation = seconds_per_token(plain)
    heads = ["arm", "reached", *COSTS, *(f"seconds if {share:.0%}" for share in SHARES)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for arm, members in by_arm.items():
        ends = [end for end in map(finish, members) if end is not None]
        cells = [arm.removeprefix(f"{target} "), f"{len(ends)}/{len(members)}"]
        if ends:
            cells += [describe([end[cost] for end in ends]) for cost in COSTS]
            for share in SHARES:
                slower = rest * share / (1 - share) / generation  # so that a plain step generates for that share of it
                seconds = [e["seconds"] + (slower - 1) * e["generation_seconds"] for e in ends]
                cells.append(describe(seconds))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each bar."""
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for target in dict.fromkeys(run["settings"]["target"] for run in runs):
        print(f"\n### {target}\n\n{table(target, runs)}")


if __name__ == "__main__":
    main()
