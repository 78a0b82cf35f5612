"""How much sooner does EffOPD bring the sandbox student to its teacher, its searches paid for?

Every run starts from the shipped student and ends when its held-out answers reach the bar, or after `max_steps`. What
is compared stands in effopd_speedup_arms.py. Held-out evaluation is outside both clocks and never touches the run:
fixed problems, fixed sampling seeds, own random state. One line per run is appended to the results; runs already there
are skipped, so a later session can add seeds.

Hardware: one x86-64 core and 1 GB. A run takes 10 to 60 seconds at 64 rollouts a step, minutes at 256 and more.
Command:  python benchmarks/effopd_speedup.py [GROUP ...]    (no group: all, in order of importance)
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from effopd_speedup_arms import GROUPS, METHODS, TARGETS, Arm, Method
from lightning.pytorch import Trainer, seed_everything
from sandbox_runs import RESULTS as FOLDER
from sandbox_runs import Trajectory, facts, fit, run_missing

from opd_lightning.backends.hf import HFStudent
from opd_lightning.extrapolation import SearchReport
from opd_lightning.interfaces import Sampling
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule
from opd_lightning.training.schedules import WarmupDecay

RESULTS = {"near": FOLDER / "effopd_speedup_cpu-2core.jsonl", "far": FOLDER / "effopd_far_cpu-2core.jsonl"}
AVERAGE_DECAY = 0.8
CAUTIOUS = 1e-4  # at most this rate: evaluated only where the bar could have been reached


class Searched(Trajectory):
    """What an arm and its searches have spent.

    Args:
        arm: What is trained.
        searcher: Something with a `last_search`, or None.
    """

    def __init__(self, arm: Arm, searcher: Any) -> None:
        super().__init__(TARGETS[arm.target].num_held_out, AVERAGE_DECAY if arm.averaged else 0.0)
        self.arm, self.searcher = arm, searcher
        self.searches: list[dict[str, Any]] = []
        self.last_report: SearchReport | None = None
        self.tokens = 0

    def account(self, trainer: Trainer, module: Any, outputs: Any, batch: Any) -> bool:
        """Evaluate where the bar could have been reached."""
        self.tokens += sum(len(rollout.response_ids) for rollout in module.last_rollouts)
        report = self.searcher.last_search if self.searcher else None
        if report is not None and report is not self.last_report:
            self.last_report = report
            self.tokens += report.tokens
            self.searches.append(asdict(report) | {"accepted": report.accepted})
        step = trainer.global_step
        has_searched = report is not None and report.step == step
        near = self.may_have_arrived(float(trainer.callback_metrics["train/loss"]), has_searched)
        return step % self.arm.evaluate_every == 0 and (near or step % 8 == 0 or step == self.arm.max_steps)

    def may_have_arrived(self, loss: float, has_searched: bool) -> bool:
        """A slow run far from the bar on its own rollouts is not there on held-out ones, unless a search moved it."""
        near = loss < 1.5 * TARGETS[self.arm.target].kl or has_searched
        return near or self.arm.lr > CAUTIOUS or self.arm.method.startswith("exopd")  # its loss has another target

    def spent(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "step": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "tokens": self.tokens,
        }

    def is_over(self, points: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every read-out of this run has reached the bar."""
        target = TARGETS[self.arm.target]
        readouts = ["", "averaged_"] if self.arm.averaged else [""]
        return all(
            any(point[f"{r}kl"] <= target.kl and point[f"{r}accuracy"] >= target.accuracy for point in points)
            for r in readouts
        )


def run(arm: Arm, seed: int, method: Method | None = None, observe: type[Searched] = Searched) -> dict[str, Any]:
    """Train one arm with one seed, which decides prompts, samples and scored prompts."""
    seed_everything(seed, verbose=False)
    method, target = method or METHODS[arm.method], TARGETS[arm.target]
    searcher = method.make_callback() if method.make_callback else None
    trajectory = observe(arm, searcher)
    module = OPDModule(
        HFStudent("sandbox:student"),
        method.make_teacher(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arm.lr, weight_decay=0.0),
        lr_scheduler=lambda optimizer: WarmupDecay(
            optimizer, arm.warmup, "linear" if arm.decay else "constant", arm.decay or None
        ),
        top_k_metrics=0,
    )
    data = OPDDataModule(
        ArithmeticTask(levels=target.levels),
        sampling=Sampling(max_new_tokens=48),
        prompts_per_step=arm.prompts,
        num_reserved=50,
        seed=seed,
    )
    fit(module, data, [searcher, trajectory] if searcher else [trajectory], arm.max_steps)
    bar = {"kl": target.kl, "accuracy": target.accuracy}
    settings = asdict(arm) | facts() | {"bar": bar}
    return {"settings": settings, "trajectory": trajectory.points, "searches": trajectory.searches}


if __name__ == "__main__":
    run_missing(GROUPS, sys.argv[1:], run, lambda arm: RESULTS[arm.target])
