"""Does a learning rate found in the run cost no more than 10 % above the swept one, from any starting rate?

The sandbox, the near bar, 64 rollouts a step, AdamW, as in effopd_speedup.py, whose runs these are. Seconds are
processor seconds with all searching included. All arms of a seed run one after the other, and all are evaluated after
every step whose own rollouts show a divergence below twice the bar.

Hardware: one x86-64 core and 1 GB, 10 to 40 seconds a run.
Command:  python benchmarks/found_rate.py [GROUP ...]    (adds what is missing; no group: all)
          python benchmarks/found_rate.py table          (the tables of README.md)
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

from effopd_speedup import Searched, run
from effopd_speedup_arms import TARGETS, Arm, Method
from effopd_speedup_statistics import interval
from found_rate_candidates import AcceptedFactors, PolyakRate
from sandbox_runs import RESULTS as FOLDER
from sandbox_runs import read_runs, run_missing

from opd_lightning.callbacks.effopd_scores import TeacherKLOnFixedRollouts
from opd_lightning.callbacks.learning_rate_search import LearningRateLineSearch

RESULTS = FOLDER / "found_rate_cpu-2core.jsonl"
STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
SWEEP = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3)
METHODS: dict[str, Method] = {
    "opd": Method(),
    "opd-again": Method(),  # at the time of the arms that are set against it
    "line-search": Method(lambda: LearningRateLineSearch(TeacherKLOnFixedRollouts(16))),
    "line-search-64": Method(lambda: LearningRateLineSearch(TeacherKLOnFixedRollouts())),
    "accepted-factors": Method(lambda: AcceptedFactors(TeacherKLOnFixedRollouts(16))),
    "polyak": Method(lambda: PolyakRate()),
    "polyak-half": Method(lambda: PolyakRate(0.5)),
    "polyak-quarter": Method(lambda: PolyakRate(0.25)),
}


def arms(method: str, *rates: float) -> list[Arm]:
    """One arm per rate."""
    return [Arm(method, lr, evaluate_every=1, max_steps=24) for lr in rates]


WINNER = arms("line-search", 1e-6, 1e-2)
GROUPS: dict[str, tuple[Sequence[int], list[Arm]]] = {  # seeds, arms
    "sweep": ((30,), arms("opd", *SWEEP)),
    "compare": (
        (40, 41, 42),
        [
            *WINNER,
            *arms("opd", 5e-4, 7e-4),
            *arms("accepted-factors", 1e-6),
            *arms("polyak-half", 1e-4),
            *arms("line-search", 1e-4, 1e-3),
            *arms("accepted-factors", 1e-2),
        ],
    ),
    "fresh": ((42, 43, 44), [*arms("line-search", 1e-6), *arms("opd", 5e-4, 7e-4), *arms("line-search", 1e-2)]),
    "more-rollouts": (range(40, 45), [*arms("opd-again", 5e-4), *arms("line-search-64", 1e-6, 1e-2)]),
    "starts": (range(40, 45), arms("line-search", 1e-5)),
}


class EveryStep(Searched):
    """Evaluates by one rule whatever the rate is said to be."""

    def may_have_arrived(self, loss: float, has_searched: bool) -> bool:
        """The loss is the divergence on fresh rollouts, one step ago."""
        return loss < 2 * TARGETS[self.arm.target].kl


def run_method(arm: Arm, seed: int) -> dict[str, Any]:
    """A run of effopd_speedup.py with a method of this file."""
    return run(arm, seed, METHODS[arm.method], EveryStep)


def print_table() -> None:
    """One line per arm; ratios of seconds are to plain OPD at 5e-4 with the same seed, of the same day."""
    ends: dict[str, dict[int, dict[str, float]]] = {}
    for entry in read_runs(RESULTS):
        bar, last = entry["settings"]["bar"], entry["trajectory"][-1]
        has_arrived = last["kl"] <= bar["kl"] and last["accuracy"] >= bar["accuracy"]
        ends.setdefault(entry["arm"], {})[entry["seed"]] = last if has_arrived else {}
    plains = {name: ends[f"{name} lr=0.0005 prompts=64"] for name in ("opd", "opd-again")}
    print("| arm | seeds | reached | steps | seconds, of those at 5e-4 |\n|---|---|---|---|---|")
    for arm, by_seed in ends.items():
        there = {seed: end for seed, end in by_seed.items() if end}
        plain = plains["opd-again" if arm.startswith(("opd-again", "line-search-64")) else "opd"]
        steps = ", ".join(f"{end['step']:.0f}" if end else "-" for _, end in sorted(by_seed.items()))
        ratios = [end["seconds"] / plain[seed]["seconds"] for seed, end in there.items() if plain.get(seed)]
        mean, spread = interval(ratios) if ratios else (math.nan, math.nan)
        shown = f"{mean:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}") + f" ({len(ratios)})"
        print(f"| {arm} | {min(by_seed)} to {max(by_seed)} | {len(there)}/{len(by_seed)} | {steps} | {shown} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print_table()
    else:
        run_missing(GROUPS, sys.argv[1:], run_method, lambda _: RESULTS)
