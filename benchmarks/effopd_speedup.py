"""How much sooner does EffOPD bring the sandbox student to its teacher, its searches paid for?

Every run starts from the shipped student and ends when its held-out answers reach the bar, or after `max_steps`. What
is compared stands in effopd_speedup_arms.py. Held-out evaluation is outside both clocks and never touches the run:
fixed problems, fixed sampling seeds, own random state. One line per run is appended to the results; runs already there
are skipped, so a later session can add seeds.

Hardware: one x86-64 core and 1 GB. A run takes 10 to 60 seconds at 64 rollouts a step, minutes at 256 and more.
Command:  python benchmarks/effopd_speedup.py [GROUP ...]    (no group: all, in order of importance)
"""

import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from effopd_speedup_arms import GROUPS, METHODS, TARGETS, Arm, Method
from lightning.pytorch import Callback, Trainer, seed_everything

from opd_lightning.backends.hf import HFStudent
from opd_lightning.callbacks.effopd_scores import divergence_from_teacher
from opd_lightning.extrapolation import SearchReport, undisturbed
from opd_lightning.interfaces import Sampling
from opd_lightning.rollouts.answering import answer, render_prompts
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule
from opd_lightning.training.schedules import WarmupDecay

FOLDER = Path(__file__).parent / "results"
RESULTS = {"near": FOLDER / "effopd_speedup_cpu-2core.jsonl", "far": FOLDER / "effopd_far_cpu-2core.jsonl"}
AVERAGE_DECAY = 0.8
CAUTIOUS = 1e-4  # at most this rate: evaluated only where the bar could have been reached


@dataclass
class Trajectory(Callback):
    """Stops both clocks, evaluates held-out problems, and ends the run at the bar. Comes after EffOPD."""

    arm: Arm
    searcher: Any  # something with a `last_search`, or None
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
        report = self.searcher.last_search if self.searcher else None
        if report is not None and report is not self.last_report:
            self.last_report = report
            self.tokens += report.tokens
            self.searches.append(asdict(report) | {"accepted": report.accepted})
        step = trainer.global_step
        has_searched = report is not None and report.step == step
        near = self.may_have_arrived(float(trainer.callback_metrics["train/loss"]), has_searched)
        if step % self.arm.evaluate_every == 0 and (near or step % 8 == 0 or step == self.arm.max_steps):
            self.evaluate(trainer, pl_module)
            trainer.should_stop = self.has_arrived()
        self.start_clocks()

    def may_have_arrived(self, loss: float, has_searched: bool) -> bool:
        """A slow run far from the bar on its own rollouts is not there on held-out ones, unless a search moved it."""
        near = loss < 1.5 * TARGETS[self.arm.target].kl or has_searched
        return near or self.arm.lr > CAUTIOUS or self.arm.method.startswith("exopd")  # its loss has another target

    def evaluate(self, trainer: Trainer, module: Any) -> None:
        """Add a point: reverse KL per token and sampled accuracy on the held-out problems."""
        point = {
            "step": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "tokens": self.tokens,
        }
        num_held_out = TARGETS[self.arm.target].num_held_out
        point |= measure(trainer, module, num_held_out)
        if self.arm.averaged:
            weights = [weight.data for weight in module.student.parameters()]
            current = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, self.average)
            point |= {f"averaged_{name}": value for name, value in measure(trainer, module, num_held_out).items()}
            torch._foreach_copy_(weights, current)
        self.points.append(point)

    def has_arrived(self) -> bool:
        """Whether every read-out of this run has reached the bar."""
        target = TARGETS[self.arm.target]
        readouts = ["", "averaged_"] if self.arm.averaged else [""]
        return all(
            any(point[f"{r}kl"] <= target.kl and point[f"{r}accuracy"] >= target.accuracy for point in self.points)
            for r in readouts
        )


def measure(trainer: Any, module: OPDModule, num_held_out: int) -> dict[str, float]:
    """Reverse KL to the true teacher per token, and sampled accuracy, on the held-out problems."""
    data = trainer.datamodule
    problems = data.task.problems("validation")[:num_held_out]
    prompts = render_prompts(
        module.spec.tokenizer, problems, range(len(problems)), num_samples=1, seed_parts=("held out",)
    )
    with undisturbed(module, seed=0):
        data.engine.sync(module.student, module.weight_version)
        rollouts = answer(data.engine, data.task, prompts, data.sampling, num_samples=1).rollouts
        distilled_from = module.teacher
        module.teacher = getattr(distilled_from, "teacher", distilled_from)
        total, count = divergence_from_teacher(module, rollouts)
        module.teacher = distilled_from
    accuracy = sum(rollout.reward for rollout in rollouts) / len(rollouts)
    return {"kl": round(total / count, 5), "accuracy": round(accuracy, 5)}


def run(arm: Arm, seed: int, method: Method | None = None, observe: type[Trajectory] = Trajectory) -> dict[str, Any]:
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
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arm.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[searcher, trajectory] if searcher else [trajectory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if trainer.received_sigterm:
        raise SystemExit("stopped in the middle of a run, which is not recorded")
    bar = {"kl": target.kl, "accuracy": target.accuracy}
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
    FOLDER.mkdir(exist_ok=True)
    for group in groups or list(GROUPS):
        seeds, arms = GROUPS[group]
        for seed in seeds:
            for arm in arms:
                path = RESULTS[arm.target]
                lines = path.read_text().splitlines() if path.exists() else []
                if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in map(json.loads, lines)}:
                    continue
                result = run(arm, seed)
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                last = result["trajectory"][-1]
                print(time.strftime("%H:%M:%S"), group, arm.name, f"seed={seed}", last, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
