"""Does a learning rate found in the run cost no more than 10 % above the swept one, from any starting rate?

The sandbox, the near bar, 64 rollouts a step, AdamW, as in effopd_speedup.py, whose runs these are. Seconds are
processor seconds with all searching included. All arms of a seed run one after the other, and all are evaluated after
every step whose own rollouts show a divergence below twice the bar.

Hardware: one x86-64 core and 1 GB, 10 to 40 seconds a run.
Command:  python benchmarks/found_rate.py [GROUP ...]    (adds what is missing; no group: all)
          python benchmarks/found_rate.py table          (the tables of README.md)
"""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from effopd_speedup import Trajectory, run
from effopd_speedup_arms import TARGETS, Arm, Method
from effopd_speedup_statistics import interval
from found_rate_candidates import AcceptedFactors, PolyakRate

from opd_lightning.callbacks.effopd_scores import TeacherKLOnFixedRollouts
from opd_lightning.callbacks.learning_rate_search import LearningRateLineSearch

RESULTS = Path(__file__).parent / "results" / "found_rate_cpu-2core.jsonl"
STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
SWEEP = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3)
METHODS: dict[str, Method] = {
    "opd": Method(),
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
    "starts": (range(40, 45), arms("line-search", 1e-5)),
}


class EveryStep(Trajectory):
    """Evaluates by one rule whatever the rate is said to be."""

    def may_have_arrived(self, loss: float, has_searched: bool) -> bool:
        """The loss is the divergence on fresh rollouts, one step ago."""
        return loss < 2 * TARGETS[self.arm.target].kl


def measure_missing(groups: Sequence[str]) -> None:
    """Run what is missing, seed by seed within a group, and append a line per run."""
    for group in groups:
        seeds, chosen = GROUPS[group]
        for seed in seeds:
            for arm in chosen:
                if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in read_runs()}:
                    continue
                result = {"group": group} | run(arm, seed, METHODS[arm.method], EveryStep)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                last = result["trajectory"][-1]
                print(time.strftime("%H:%M:%S"), group, arm.name, f"seed={seed}", last, flush=True)


def read_runs() -> list[dict[str, Any]]:
    """All runs recorded so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def print_table() -> None:
    """One line per arm; ratios of seconds are to plain OPD at 5e-4 with the same seed."""
    ends: dict[str, dict[int, dict[str, float]]] = {}
    for entry in read_runs():
        bar, last = entry["settings"]["bar"], entry["trajectory"][-1]
        has_arrived = last["kl"] <= bar["kl"] and last["accuracy"] >= bar["accuracy"]
        ends.setdefault(entry["arm"], {})[entry["seed"]] = last if has_arrived else {}
    plain = ends["opd lr=0.0005 prompts=64"]
    print("| arm | seeds | reached | steps | seconds, of those at 5e-4 |\n|---|---|---|---|---|")
    for arm, by_seed in ends.items():
        there = {seed: end for seed, end in by_seed.items() if end}
        steps = ", ".join(f"{end['step']:.0f}" if end else "-" for _, end in sorted(by_seed.items()))
        ratios = [end["seconds"] / plain[seed]["seconds"] for seed, end in there.items() if plain.get(seed)]
        mean, spread = interval(ratios) if ratios else (math.nan, math.nan)
        shown = f"{mean:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}") + f" ({len(ratios)})"
        print(f"| {arm} | {min(by_seed)} to {max(by_seed)} | {len(there)}/{len(by_seed)} | {steps} | {shown} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    if sys.argv[1:] == ["table"]:
        print_table()
    else:
        measure_missing(sys.argv[1:] or list(GROUPS))
