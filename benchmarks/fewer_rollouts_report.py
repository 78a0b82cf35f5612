"""Tables of fewer_rollouts.py: what each arm had cost when it reached the bar, and against the best plain runs.

Costs are means over seeds with 95 % t-intervals. Ratios are paired by seed (same prompts), averaged as logarithms, with
t-intervals; on every axis the plain arm is the one whose mean is best *on that axis*, out of those that every seed of
theirs brought to the bar. Searches are included in all costs. Seconds "at 50 %" and so on are computed, not measured:
generation is taken to be so many times slower that it fills that share of a step of the plain arm with the fewest
seconds; everything else stays as measured.

Hardware: any.
Command:  python benchmarks/fewer_rollouts_report.py [near|far|long-near|long-divergence|long|long-arrived ...]
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effopd_speedup_statistics import interval
from fewer_rollouts import RESULTS
from fewer_rollouts_groups import SCREEN
from long_sandbox import BARS, PROMPTS_PER_STEP
from long_sandbox import RESULTS as LONG_RESULTS
from sandbox_runs import read_runs

COSTS = ("rounds", "rollouts", "tokens", "updates", "seconds")
SHARES = (0.5, 0.75, 0.9)  # of a plain step, that generation is supposed to take
COMPARED = ("rounds", "rollouts", "tokens", "seconds", *(f"seconds at {share:.0%}" for share in SHARES))
REPORTS = {  # bar: problem of the runs
    "near": "near",
    "far": "far",
    "long-near": "long",
    "long-divergence": "long",  # that of the far bar, without its accuracy
    "long": "long",
    "long-arrived": "long-arrived",  # to that divergence again, and then many problems
}
LONG_BARS = {"long-near": vars(BARS["near"]), "long-divergence": {"kl": BARS["far"].kl, "accuracy": 0.0}}
PLAIN_KEYS = ("max_kl", "search", "blind", "horizon", "is_behind", "penalty", "lora")

Finish = dict[str, float] | None  # costs at the first point at the bar, or never


def finish(run: Mapping[str, Any], bar: Mapping[str, float]) -> Finish:
    """The first point at the bar; None where the run never got there."""
    readout = "averaged_" if run["settings"].get("average") else ""
    for point in run["trajectory"]:
        if point[f"{readout}kl"] <= bar["kl"] and point[f"{readout}accuracy"] >= bar["accuracy"]:
            return dict(point)
    return None


def is_plain(run: Mapping[str, Any]) -> bool:
    """Whether each rollout is fresh, whole and trained on once, by OPD alone."""
    settings = run["settings"]
    once = settings["mini_batches"] == 1 and settings["passes"] == 1
    return once and not any(settings.get(key) for key in PLAIN_KEYS)


class Table:
    """Arms with one bar.

    Args:
        name: Key of REPORTS.
        runs: Those of its problem.
    """

    def __init__(self, name: str, runs: Sequence[Mapping[str, Any]]) -> None:
        bar = LONG_BARS.get(name, runs[0]["settings"]["bar"])
        self.prefix = f"{REPORTS[name]} "
        self.finishes: dict[str, dict[int, Finish]] = defaultdict(dict)
        for run in runs:
            self.finishes[run["arm"]][run["seed"]] = finish(run, bar)
        plain = {run["arm"] for run in runs if is_plain(run)}
        self.plain = [arm for arm in plain if all(self.finishes[arm].values())]
        if not self.plain:
            raise ValueError(f"{name}: no plain arm has reached the bar, so there is nothing to compare with.")
        self.add_slower_generation(self.best_plain("seconds"))

    def best_plain(self, cost: str) -> str:
        """The plain arm that is best on an axis, out of those with at least half as many seeds as any."""
        most = max(len(self.finishes[arm]) for arm in self.plain)
        return min(
            (arm for arm in self.plain if 2 * len(self.finishes[arm]) >= most),
            key=lambda arm: statistics.fmean(end[cost] for end in self.finishes[arm].values() if end),
        )

    def add_slower_generation(self, reference: str) -> None:
        """Add seconds as they would be if generation filled a share of the reference's step."""
        ends = [end for end in self.finishes[reference].values() if end]
        generation = statistics.fmean(end["generation_seconds"] / end["seconds"] for end in ends)
        self.measured_share = generation
        for end in (end for by_seed in self.finishes.values() for end in by_seed.values() if end):
            for share in SHARES:
                slower = (1 - generation) * share / (1 - share) / generation
                end[f"seconds at {share:.0%}"] = end["seconds"] + (slower - 1) * end["generation_seconds"]

    def costs(self) -> str:
        """One row for each arm: what it had spent at the bar."""
        heads = ["arm", "seeds", "reached", *COSTS[:2], "tokens (1000)", *COSTS[3:], *COMPARED[4:]]

        def row(arm: str) -> list[str]:
            by_seed = self.finishes[arm]
            ends = [end for end in by_seed.values() if end]
            cells = [show_seeds(sorted(by_seed)), f"{len(ends)}/{len(by_seed)}"]
            for cost in (*COSTS, *COMPARED[4:]):
                scale = 1000 if cost == "tokens" else 1
                cells.append(describe([end[cost] / scale for end in ends]) if ends else "-")
            return cells

        return self.markdown(heads, row)

    def ratios(self, arms: Sequence[str]) -> str:
        """How many times less than the best plain arm on each axis."""
        best = {cost: self.best_plain(cost) for cost in COMPARED}
        heads = ["arm", *(f"{cost} (best plain: {self.short(best[cost])})" for cost in COMPARED)]
        return self.markdown(heads, lambda arm: [self.ratio(best[cost], arm, cost) for cost in COMPARED], arms)

    def ratio(self, plain: str, arm: str, cost: str) -> str:
        """Plain cost / cost of the arm."""
        pairs = [(self.finishes[plain].get(seed), end) for seed, end in self.finishes[arm].items()]
        logs = [math.log(before[cost] / after[cost]) for before, after in pairs if before and after]
        if not logs or not all(self.finishes[arm].values()):
            return "-"
        mean, half = interval(logs)
        text = f"{math.exp(mean):.2f}"
        return text if len(logs) < 2 else f"{text} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"

    def markdown(self, heads: list[str], row: Callable[[str], list[str]], arms: Sequence[str] | None = None) -> str:
        """A table, arm by arm."""
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines += [f"| {' | '.join([self.short(arm), *row(arm)])} |" for arm in (arms or list(self.finishes))]
        return "\n".join(lines)

    def short(self, arm: str) -> str:
        """Without the problem's name."""
        return arm.removeprefix(self.prefix)


def read_long_sandbox() -> list[dict[str, Any]]:
    """Runs of long_sandbox.py in the words of fewer_rollouts.py: 64 rollouts a step, fresh or out of one round."""
    runs = []
    for run in read_runs(LONG_RESULTS):
        is_plain = run["settings"]["method"] == "opd"
        settings = {"target": "long", "mini_batches": 1, "passes": 1 if is_plain else "many"}
        points = []
        for point in run["trajectory"]:
            rollouts = PROMPTS_PER_STEP * point["step"]
            rounds = point["step"] if is_plain else min(point["step"], 1)
            rollouts = rollouts if is_plain else min(rollouts, run["settings"]["num_rollouts"])
            points.append(point | {"rounds": rounds, "rollouts": rollouts, "updates": point["step"]})
        name = f"rollouts={PROMPTS_PER_STEP} lr={run['settings']['lr']:g}" if is_plain else "one round of 3,072"
        bar = vars(BARS["far"])
        runs.append(run | {"arm": f"long {name}", "settings": settings | {"bar": bar}, "trajectory": points})
    return runs


def finals(runs: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on many problems where each run ended, percent, and minus the plain run's of the same seed."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        readout = "averaged_" if run["settings"].get("average") else ""
        found[run["arm"]][run["seed"]] = 100 * run["final"][f"{readout}accuracy"]
    plain = found[next(run["arm"] for run in runs if is_plain(run))]
    lines = [
        f"| arm | seeds | accuracy on {runs[0]['final']['problems']:,} | minus the plain run's |",
        "|---|---|---|---|",
    ]
    for arm, by_seed in found.items():
        less = [value - plain[seed] for seed, value in by_seed.items() if seed in plain]
        (mean, half), (more, width) = interval(list(by_seed.values())), interval(less)
        difference = "" if by_seed is plain else f"{more:+.1f} ± {width:.1f}"
        lines.append(f"| {arm} | {show_seeds(sorted(by_seed))} | {mean:.1f} ± {half:.1f} | {difference} |")
    return "\n".join(lines)


def describe(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % t-interval."""
    mean, half = interval(values)
    digits = 1 if mean < 10 else 0
    return f"{mean:,.{digits}f}" + ("" if len(values) < 2 else f" ± {half:,.{digits}f}")


def show_seeds(seeds: Sequence[int]) -> str:
    """`30-34` or `30, 32`."""
    is_run = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    return f"{seeds[0]}-{seeds[-1]}" if is_run else ", ".join(map(str, seeds))


def main(names: Sequence[str]) -> None:
    """Print the tables of each bar, screening apart."""
    runs = [*read_runs(RESULTS), *read_long_sandbox()]
    for name in names or list(REPORTS):
        members = [run for run in runs if run["settings"]["target"] == REPORTS[name]]
        for title, chosen in (
            ("screening", [run for run in members if run["seed"] in SCREEN]),
            ("fresh seeds", [run for run in members if run["seed"] not in SCREEN]),
        ):
            if not chosen:
                continue
            try:
                table = Table(name, chosen)
            except ValueError as error:
                print(f"\n### {name}: {title}\n\n{error}")
                continue
            print(f"\n### {name}: {title}\n\n{table.costs()}\n")
            print(f"Generation takes {table.measured_share:.0%} of the reference's seconds as measured.")
            others = [arm for arm in table.finishes if arm not in table.plain and any(table.finishes[arm].values())]
            if name == "long-arrived":
                print(f"\n{finals(chosen)}")
            print(f"\nTimes less than the best plain arm on each axis:\n\n{table.ratios(others)}")


if __name__ == "__main__":
    main(sys.argv[1:])
