"""How much sooner does EffOPD bring the sandbox student to its teacher, its searches paid for?

Every run starts from the shipped student and ends when its held-out answers reach the bar, or after `max_steps`. The
bar was chosen from two plain runs (seed 0, learning rates 1e-3 and 1e-4) before any run with EffOPD, and then frozen.
Held-out evaluation is outside both clocks and never touches the run: fixed problems, fixed sampling seeds, own random
state. One line per run is appended to the results; runs already there are skipped, so a later session can add seeds.

Hardware: one x86-64 core and 1 GB. A run takes 10 to 60 seconds.
Command:  python benchmarks/effopd_speedup.py [GROUP ...]    (no group: all, in order of importance)
"""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.callbacks.opd_scores import (
    TaskAccuracy,
    TeacherKL,
    TeacherKLOnFixedRollouts,
    divergence_from_teacher,
)
from opd_lightning.datamodule import OPDDataModule
from opd_lightning.evaluation import answer, render_prompts
from opd_lightning.extrapolation import SearchReport, undisturbed
from opd_lightning.interfaces import Sampling
from opd_lightning.module import OPDModule
from opd_lightning.schedules import WarmupDecay
from opd_lightning.tasks import ArithmeticTask

RESULTS = Path(__file__).parent / "results" / "effopd_speedup_cpu-2core.jsonl"
KL_BAR, ACCURACY_BAR = 0.035, 0.87
NUM_HELD_OUT, EVALUATE_EVERY, AVERAGE_DECAY = 128, 2, 0.8

TWO_SIDED: dict[str, Any] = {"schedule": 4, "backward": (-0.5,)}
DENSE = [1, 2, *range(4, 97, 4)]  # as the paper begins, and no long pause later
DOUBLING = (1.0, 2.0, 4.0, 8.0)
FINE = (0.5, 1.0, 2.0, 4.0, 8.0)
METHODS: dict[str, Callable[[], EffOPD] | None] = {
    "opd": None,
    "effopd-accuracy": lambda: EffOPD(TaskAccuracy(50)),
    "effopd-kl": lambda: EffOPD(TeacherKL(50)),
    "effopd-fixed": lambda: EffOPD(TeacherKLOnFixedRollouts(50)),
    "two-sided-kl": lambda: EffOPD(TeacherKL(50), **TWO_SIDED),
    "dense-fixed": lambda: EffOPD(TeacherKLOnFixedRollouts(50), schedule=DENSE, candidates=DOUBLING),
    "dense-two-sided-fixed": lambda: EffOPD(
        TeacherKLOnFixedRollouts(50), schedule=DENSE, candidates=DOUBLING, backward=(-0.5,)
    ),
    "fine-kl": lambda: EffOPD(TeacherKL(50), candidates=FINE, **TWO_SIDED),
    "fine-fixed": lambda: EffOPD(TeacherKLOnFixedRollouts(50), candidates=FINE, **TWO_SIDED),
    "two-sided-fixed": lambda: EffOPD(TeacherKLOnFixedRollouts(50), **TWO_SIDED),
}


@dataclass(frozen=True)
class Arm:
    """One setting; `name` identifies it in the results.

    Attributes:
        method: Key of METHODS.
        lr: Learning rate of AdamW.
        warmup: Steps of linear warm-up.
        decay: Step at which a linear decay to zero ends; 0 keeps the rate.
        prompts: Prompts, and rollouts, per step.
        averaged: Evaluate an exponential average of the weights too.
        max_steps: Give up here.
    """

    method: str
    lr: float
    warmup: int = 0
    decay: int = 0
    prompts: int = 64
    averaged: bool = False
    max_steps: int = 48

    @property
    def name(self) -> str:
        """For example `opd lr=0.0005 warmup=4`."""
        extras = [f"{key}={value}" for key in ("warmup", "decay") if (value := getattr(self, key))]
        return " ".join([self.method, f"lr={self.lr:g}", f"prompts={self.prompts}", *extras])


CAUTIOUS = (5e-5, 1e-4)
PAPER = ("effopd-accuracy", "effopd-kl", "effopd-fixed")
GROUPS: dict[str, tuple[int, list[Arm]]] = {  # number of seeds, arms; most important first
    "cautious": (5, [Arm(method, 1e-4, max_steps=64) for method in ("opd", *PAPER)]),
    "slow": (5, [Arm(m, 5e-5, max_steps=96) for m in ("opd", "effopd-kl", "effopd-fixed", "effopd-accuracy")]),
    "remedy": (5, [Arm("dense-fixed", 5e-5, max_steps=96), Arm("dense-fixed", 1e-4, max_steps=64)]),
    "tuned": (
        3,
        [
            Arm("opd", 5e-4, averaged=True),
            Arm("two-sided-kl", 5e-4),
            Arm("two-sided-fixed", 5e-4),
            Arm("opd", 1e-3, warmup=4, decay=24, averaged=True, max_steps=24),
            Arm("two-sided-kl", 1e-3),
            Arm("opd", 1e-3, averaged=True),
            Arm("opd", 3e-4),
        ],
    ),
    "large": (
        3,
        [
            Arm("opd", 1e-3, prompts=256, max_steps=24),
            Arm("two-sided-kl", 1e-3, prompts=256, max_steps=24),
            Arm("opd", 5e-4, prompts=256, max_steps=24),
            Arm("dense-two-sided-fixed", 5e-4, prompts=256, max_steps=24),
        ],
    ),
    "confirm": (7, [Arm(method, 5e-5, max_steps=96) for method in ("opd", "dense-fixed")]),
    "no-harm": (
        3,
        [
            Arm("dense-two-sided-fixed", 5e-4),
            Arm("opd", 2e-3, averaged=True, max_steps=32),
            Arm("two-sided-kl", 2e-3, max_steps=32),
            Arm("effopd-accuracy", 5e-4),
        ],
    ),
    "every-4": (5, [Arm(method, 1e-4, max_steps=64) for method in ("two-sided-kl", "fine-fixed", "fine-kl")]),
}


@dataclass
class Trajectory(Callback):
    """Stops both clocks, evaluates held-out problems, and ends the run at the bar. Comes after EffOPD."""

    arm: Arm
    effopd: EffOPD | None
    points: list[dict[str, float]] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Answer the held-out problems once before the first step, then start the clocks."""
        self.last_report: SearchReport | None = None
        self.average = [weight.detach().clone() for weight in pl_module.student.parameters()]
        self.evaluate(trainer, pl_module)
        self.start_clocks()

    def start_clocks(self) -> None:
        self.started = (time.process_time(), time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Account for the step and its search; evaluate where the bar could have been reached."""
        weights = list(pl_module.student.parameters())
        if self.arm.averaged:
            torch._foreach_lerp_(self.average, [weight.detach() for weight in weights], 1 - AVERAGE_DECAY)
        self.seconds += time.process_time() - self.started[0]
        self.wall_seconds += time.perf_counter() - self.started[1]
        self.tokens += sum(len(rollout.response_ids) for rollout in pl_module.last_rollouts)
        report = self.effopd.last_search if self.effopd else None
        if report is not None and report is not self.last_report:
            self.last_report = report
            self.tokens += report.tokens
            self.searches.append(asdict(report) | {"accepted": report.accepted})
        step = trainer.global_step
        # a slow run far from the bar on its own rollouts is not there on held-out ones, unless a search has moved it
        near = float(trainer.callback_metrics["train/loss"]) < 1.5 * KL_BAR or (report and report.step == step)
        near = near or self.arm.lr > max(CAUTIOUS)
        if step % EVALUATE_EVERY == 0 and (near or step % 8 == 0 or step == self.arm.max_steps):
            self.evaluate(trainer, pl_module)
            trainer.should_stop = self.has_arrived()
        self.start_clocks()

    def evaluate(self, trainer: Trainer, module: Any) -> None:
        """Add a point: reverse KL per token and sampled accuracy on the held-out problems."""
        point = {
            "step": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "tokens": self.tokens,
        }
        point |= measure(trainer, module)
        if self.arm.averaged:
            weights = [weight.data for weight in module.student.parameters()]
            current = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, self.average)
            point |= {f"averaged_{name}": value for name, value in measure(trainer, module).items()}
            torch._foreach_copy_(weights, current)
        self.points.append(point)

    def has_arrived(self) -> bool:
        """Whether every read-out of this run has reached the bar."""
        readouts = ["", "averaged_"] if self.arm.averaged else [""]
        return all(
            any(point[f"{r}kl"] <= KL_BAR and point[f"{r}accuracy"] >= ACCURACY_BAR for point in self.points)
            for r in readouts
        )


def measure(trainer: Any, module: OPDModule) -> dict[str, float]:
    """Reverse KL per token and sampled accuracy on the held-out problems."""
    data = trainer.datamodule
    problems = data.task.problems("validation")[:NUM_HELD_OUT]
    prompts = render_prompts(
        module.spec.tokenizer, problems, range(len(problems)), num_samples=1, seed_parts=("held out",)
    )
    with undisturbed(module, seed=0):
        data.engine.sync(module.student, module.weight_version)
        rollouts = answer(data.engine, data.task, prompts, data.sampling, num_samples=1).rollouts
        total, count = divergence_from_teacher(module, rollouts)
    accuracy = sum(rollout.reward for rollout in rollouts) / len(rollouts)
    return {"kl": round(total / count, 5), "accuracy": round(accuracy, 5)}


def run(arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, which decides prompts, samples and scored prompts."""
    seed_everything(seed, verbose=False)
    make_effopd = METHODS[arm.method]
    effopd = make_effopd() if make_effopd else None
    trajectory = Trajectory(arm, effopd)
    module = OPDModule(
        HFStudent("sandbox:student"),
        HFTeacher("sandbox:teacher", dtype="float32"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arm.lr, weight_decay=0.0),
        lr_scheduler=lambda optimizer: WarmupDecay(
            optimizer, arm.warmup, "linear" if arm.decay else "constant", arm.decay or None
        ),
        top_k_metrics=0,
    )
    data = OPDDataModule(
        ArithmeticTask(levels=(1, 2)),
        sampling=Sampling(max_new_tokens=48),
        prompts_per_step=arm.prompts,
        num_reserved=50,
        seed=seed,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arm.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[effopd, trajectory] if effopd else [trajectory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    bar = {"kl": KL_BAR, "accuracy": ACCURACY_BAR}
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "bar": bar}
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": asdict(arm) | facts,
        "trajectory": trajectory.points,
        "searches": trajectory.searches,
    }


def main(groups: list[str]) -> None:
    """Run what is missing, seed by seed within a group, and append a line per run."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for group in groups or list(GROUPS):
        num_seeds, arms = GROUPS[group]
        for seed in range(num_seeds):
            for arm in arms:
                lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
                if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in map(json.loads, lines)}:
                    continue
                result = run(arm, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                last = result["trajectory"][-1]
                print(time.strftime("%H:%M:%S"), group, arm.name, f"seed={seed}", last, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
