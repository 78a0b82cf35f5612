"""The table of methods.py: gain over plain distillation at equal rollouts and at equal processor seconds.

A gain is the reverse KL that plain distillation still has, over the contestant's, both held out and with the same
prompts (seed): above 1 is nearer the teacher. Means are of logarithms, with 95 % t-intervals over seeds; at equal
seconds the logarithm of the divergence is interpolated between measurements. A gain counts as shown where the interval
of at least five seeds lies on one side of 1. Contestants without fresh seeds are shown as tuned: one run, no claim.

Hardware: any.
Command:  python benchmarks/methods_report.py [short|long|short:plain-sampled ...]    (gains over another contestant)
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from effopd_speedup_statistics import interval
from methods import NOT_RUN, RESULTS, SANDBOXES, TUNING_SEED, after_rollouts, best_rate, contestants
from sandbox_runs import read_runs

SMALLEST = 1e-6  # nats: below, nothing is measured
Records = dict[int, Mapping[str, Any]]  # by seed


def at_seconds(record: Mapping[str, Any], seconds: float) -> float:
    """Logarithm of the divergence when a run had taken so long; its last one where it took less."""
    points = [(point["seconds"], math.log(max(point["kl"], SMALLEST))) for point in record["trajectory"]]
    for (before, high), (after, low) in pairwise(points):
        if after >= seconds:
            return high + (low - high) * (seconds - before) / (after - before)
    return points[-1][1]


def at_rollouts(record: Mapping[str, Any]) -> float:
    """Logarithm of the divergence when a run had had its rollouts."""
    return math.log(max(after_rollouts(record)["kl"], SMALLEST))


def gain(plain: Sequence[float], other: Sequence[float]) -> tuple[str, str]:
    """Mean ratio with its interval, and what it shows."""
    differences = [before - after for before, after in zip(plain, other, strict=True)]
    mean, half = interval(differences)
    if len(differences) < 2:
        return f"{math.exp(mean):.2f}", "tuned only"
    text = f"{math.exp(mean):.2f} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"
    if len(differences) < 5:
        return text, "too few seeds"
    return text, "nearer" if mean > half else "farther" if mean < -half else "no difference shown"


def chosen(where: str) -> dict[str, Records]:
    """The runs of each contestant at its own best rate: fresh seeds, or the tuning run where there are none."""
    every: dict[str, Records] = defaultdict(dict)
    records = [record for record in read_runs(RESULTS) if record["sandbox"] == where]
    for name in contestants():
        own = [record for record in records if record["name"] == name]
        if own:
            lr = best_rate(name, where)
            runs = {record["seed"]: record for record in own if record["settings"]["lr"] == lr}
            every[name] = {seed: runs[seed] for seed in sorted(runs) if seed != TUNING_SEED} or runs
    return every


def table(where: str, over: str = "plain") -> str:
    """One row for each contestant, the nearest first; gains are over one of them."""
    every = chosen(where)
    seconds = SANDBOXES[where].seconds
    plain = every[over] | {
        record["seed"]: record
        for record in read_runs(RESULTS)
        if (record["name"], record["sandbox"], record["seed"]) == (over, where, TUNING_SEED)
        and record["settings"]["lr"] == best_rate(over, where)
    }
    rows = []
    for name, runs in every.items():
        seeds = [seed for seed in runs if seed in plain]
        ends = [after_rollouts(runs[seed]) for seed in runs]
        same, verdict = gain([at_rollouts(plain[s]) for s in seeds], [at_rollouts(runs[s]) for s in seeds])
        timed, timed_verdict = gain(
            [at_seconds(plain[s], seconds) for s in seeds], [at_seconds(runs[s], seconds) for s in seeds]
        )
        kl = math.exp(statistics.fmean(at_rollouts(run) for run in runs.values()))
        accuracy = statistics.fmean(end["accuracy"] for end in ends)
        cells = [name, f"{best_rate(name, where):g}", str(len(seeds)), f"{kl:.4f}", f"{accuracy:.0%}"]
        cells += [f"{same}: {verdict}", f"{timed}: {timed_verdict}"] if name != over else ["1", "1"]
        rows.append((kl, f"| {' | '.join(cells)} |"))
    heads = ["method", "rate", "seeds", "reverse KL", "accuracy", "gain at equal rollouts", "gain at equal seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(row for _, row in sorted(rows))]
    lines += [f"\nNot run: {name}, {why}." for name, why in NOT_RUN.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SANDBOXES:
        sandbox, _, base = wanted.partition(":")
        print(f"\n### {wanted}\n\n{table(sandbox, base or 'plain')}")
