"""Turn the runs of effopd_speedup.py into tables (standard output) and docs/effopd_speedup.png.

Seconds are processor seconds of the single-threaded process: what a wall clock shows on an idle core, whatever else the
machine was doing. Means carry a 95 % t-interval over seeds. Speed-ups are paired by seed (same prompts, same samples of
the first step), averaged as logarithms. A baseline that never reached the bar counts with its end ("at least").
The table of levels asks the same for looser bars on the divergence alone: plain runs are interpolated between
evaluations (linear in the logarithm), runs with searches are not, which favours the plain ones.

Command: python benchmarks/effopd_speedup_report.py [WORD IN A SECTION'S TITLE ...]
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopd_speedup import RESULTS
from effopd_speedup_arms import GROUPS
from effopd_speedup_picture import draw
from effopd_speedup_statistics import (
    COSTS,
    Row,
    best_plain,
    cost_at_level,
    describe_cosines,
    describe_cost,
    describe_speedup,
    interval,
    read_rows,
    same_rate,
)

PICTURE = Path(__file__).parent.parent / "docs" / "effopd_speedup.png"
LEVELS = (0.15, 0.1, 0.07, 0.05, 0.035)
EXPLORATORY = ("fine-", "two-sided-kl lr=0.0001")  # one or two seeds


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: Heading.
        groups: Groups of effopd_speedup_arms whose arms it shows.
        seeds: Seeds read.
        target: Problem whose results are read.
        prompts: Rollouts per step shown; 0 shows all.
    """

    title: str
    groups: tuple[str, ...]
    seeds: range
    target: str = "near"
    prompts: int = 0

    def shows(self, row: Row) -> bool:
        """Whether this arm is in the table: one of its groups', or plain OPD to compare with."""
        members = [arm for group in self.groups for arm in GROUPS[group][1]]
        plain = {(arm.lr, arm.prompts) for arm in members}
        name = row.name.removesuffix(" averaged")
        is_baseline = row.name.startswith("opd") and (row.settings["lr"], row.settings["prompts"]) in plain
        is_shown = name in {arm.name for arm in members} or (is_baseline and not row.settings["decay"])
        return is_shown and self.prompts in (0, row.settings["prompts"]) and not row.name.startswith(EXPLORATORY)


SECTIONS = (
    Section("Does it bring the student sooner to its teacher?", ("cautious", "slow", "remedy", "tuned"), range(5)),
    Section("Confirmation on fresh seeds", ("confirm",), range(5, 12)),
    Section("A tuned rate and one too large", ("too-large",), range(5, 10)),
    Section("The paper's baselines", ("baselines", "baselines-more", "confirm"), range(5, 10)),
    Section("Size of the validation set", ("sizes", "confirm"), range(5, 8)),
    Section("Difficulty of the validation set", ("difficulty", "sizes", "confirm"), range(5, 8)),
    Section("256 rollouts a step", ("large",), range(3), prompts=256),
    Section("1,024 rollouts a step", ("paper-ratio",), range(5, 8), prompts=1024),
    Section("A far bar", ("far", "far-more"), range(1, 4), target="far"),
    Section("Ideas", ("adaptive", "ideas", "confirm"), range(5, 10)),
)


def print_table(rows: Sequence[Row], section: Section) -> None:
    """A Markdown table, and which plain run was the best of all."""
    columns = ["arm", "reached", "steps", "seconds", "1000 tokens", "searching"]
    columns += ["speed-up over OPD at this rate: steps", "seconds", "over the best plain: seconds"]
    print(f"\n### {section.title} (seeds {section.seeds.start} to {section.seeds.stop - 1})\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in filter(section.shows, rows):
        rate, best = same_rate(row, rows), best_plain(row, rows)
        cells = [row.name, f"{sum(f.reached for f in row.finishes.values())}/{len(row.finishes)}"]
        cells += [describe_cost(row, cost) for cost in COSTS]
        cells.append("-" if row.search_share == 0 else f"{row.search_share:.0%}")
        cells += [describe_speedup(rate, row, cost) for cost in COSTS[:2]]
        cells.append(describe_speedup(best, row, "seconds"))
        print("| " + " | ".join(cells) + " |")
    for prompts in sorted({row.settings["prompts"] for row in filter(section.shows, rows)}):
        best = best_plain(next(row for row in rows if row.settings["prompts"] == prompts), rows)
        print(f"\nBest plain at {prompts} rollouts a step: {best.name if best else 'none reached the bar every time'}")


def print_levels(runs: Sequence[dict[str, Any]], arms: Sequence[str]) -> None:
    """Speed-up in processor seconds over plain OPD at the same rate, for looser bars."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        by_arm[run["arm"]][run["seed"]] = run
    print("\n| seconds to reach a divergence, as speed-up | " + " | ".join(map(str, LEVELS)) + " |")
    print("|" + "---|" * (1 + len(LEVELS)))
    for arm in arms:
        members, plain = by_arm[arm], by_arm[arm.replace(arm.split()[0], "opd", 1)]
        cells = []
        for level in LEVELS:
            seeds = plain.keys() & members.keys()
            pairs = [[cost_at_level(of[seed], level, "seconds") for of in (plain, members)] for seed in seeds]
            ratios = [math.log(a / b) for a, b in pairs if a is not None and b is not None]
            mean, half = interval(ratios) if ratios else (math.nan, math.nan)
            spread = "" if math.isnan(half) else f" [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"
            cells.append(f"{math.exp(mean):.2f}{spread}" if ratios else "-")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main(words: Sequence[str] = ()) -> None:
    """Print the tables and draw."""
    runs = {
        target: [json.loads(line) for line in path.read_text().splitlines()]
        for target, path in RESULTS.items()
        if path.exists()
    }
    for section in SECTIONS:
        if section.target in runs and (not words or any(word in section.title for word in words)):
            members = [run for run in runs[section.target] if run["seed"] in section.seeds]
            print_table(read_rows(members), section)
    if not words:
        cautious = [arm.name for group in ("cautious", "slow", "remedy") for arm in GROUPS[group][1]]
        print_levels(runs["near"], [name for name in cautious if not name.startswith("opd")])
        print(f"\n{describe_cosines(runs['near'])}")
        draw(runs["near"], PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
