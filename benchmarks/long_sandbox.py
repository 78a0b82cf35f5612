"""Is the long sandbox what it is for? On-policy distillation should arrive, late, where one stale round does not.

(1) `one-round` arms train on 3,072 rollouts of the initial student, over and over, and never generate again.
(2) `opd` arms are plain on-policy distillation, AdamW at constant rates, 64 rollouts a step.
(3) Every evaluation says how many processor seconds have gone into generation, and how many into everything.

A run ends at the first evaluation that reaches its bar, or when its arm gives up. Held-out evaluation (fixed problems,
fixed sampling seeds, own random state) is outside the clock. One line per run is appended to the results; runs already
there are skipped. Seconds are processor seconds of the process. Another benchmark can import `BARS` and `measure`.

Hardware: one x86-64 core and 1 GB.
Command:  python benchmarks/long_sandbox.py [GROUP ...]    (no group: all)
"""

import copy
import json
import logging
import os
import random
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.callbacks.effopd_scores import divergence_from_teacher
from opd_lightning.extrapolation import undisturbed
from opd_lightning.interfaces import LiveStudent, Rollout, RolloutBatch, Sampling, StepPrompts
from opd_lightning.rollouts.answering import answer, render_prompts
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.tasks.ledger import LedgerTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = Path(__file__).parent / "results" / "long_sandbox_cpu-2core.jsonl"
STUDENT = os.environ.get("LONG_STUDENT", "sandbox:long-student")
TEACHER = os.environ.get("LONG_TEACHER", "sandbox:long-teacher")
PROMPTS_PER_STEP = 64
NUM_HELD_OUT = 64
EVALUATE_EVERY = 10
SAMPLING = Sampling(max_new_tokens=128)


@dataclass(frozen=True)
class Bar:
    """What ends a run: reverse KL (nats per token, at most) and sampled accuracy (at least), both held out."""

    kl: float
    accuracy: float


# Laid at the first plain run (AdamW at 1e-3, seed 0), at its 20th and its 90th update, before any other run was made.
BARS = {"near": Bar(kl=0.01, accuracy=0.88), "far": Bar(kl=0.001, accuracy=0.96)}


class TimedOnPolicy(OnPolicy):
    """Counts the processor seconds of generation."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        started = time.process_time()
        batch = super().rollouts(step, sampling, student)
        self.seconds += time.process_time() - started
        return batch


class OneRound(TimedOnPolicy):
    """All rollouts come from the initial student: a first pass as it writes them, then shuffled passes over the same.

    Args:
        num_steps: Steps of the first pass.
    """

    staleness = 1  # of the second step; it grows with every further one

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.initial: Any = None
        self.kept: list[Rollout] = []
        self.pending: list[Rollout] = []

    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        if self.initial is None:
            self.initial = copy.deepcopy(student.model).requires_grad_(False)
        size = len(step.prompts)
        if len(self.kept) < self.num_steps * size:
            started = time.process_time()
            self.engine.sync(self.initial, -2)
            rollouts = self.engine.generate(step.prompts, sampling)
            self.kept += rollouts
            self.seconds += time.process_time() - started
        else:
            if not self.pending:
                self.pending = random.Random(step.step).sample(self.kept, len(self.kept))
            rollouts, self.pending = self.pending[:size], self.pending[size:]
        return RolloutBatch(rollouts, 0, step.step, sampling, {}, staleness=max(step.step, 1))


@dataclass(frozen=True)
class Arm:
    """One setting; `name` identifies it in the results.

    Attributes:
        method: `opd` or `one-round`.
        lr: Constant learning rate of AdamW.
        bar: Key of BARS; None runs to the end.
        max_steps: Give up here.
        max_seconds: Give up at the first evaluation after so many processor seconds.
        num_rollouts: Rollouts of the one round; a multiple of the 64 of a step.
    """

    method: str
    lr: float
    bar: str | None = "far"
    max_steps: int = 400
    max_seconds: float = 3600.0
    num_rollouts: int = 3072

    @property
    def name(self) -> str:
        """For example `opd lr=0.0005` or `one-round lr=0.0005 rollouts=3072`."""
        return f"{self.method} lr={self.lr:g}" + (f" rollouts={self.num_rollouts}" * (self.method == "one-round"))


GROUPS: dict[str, tuple[tuple[int, ...], list[Arm]]] = {  # seeds, arms
    "first": (
        (0,),
        [
            Arm("opd", 1e-3, bar=None, max_steps=120),
            Arm("one-round", 1e-3, bar=None, max_steps=120),
        ],
    ),
    "sweep": ((0, 1, 2), [Arm("opd", lr) for lr in (2e-4, 5e-4, 1e-3, 2e-3)]),
    "one-round": ((0, 1, 2), [Arm("one-round", lr) for lr in (2e-4, 5e-4, 1e-3)]),
}


@dataclass
class Trajectory(Callback):
    """Stops the clock, evaluates held-out problems, and ends the run at the bar."""

    arm: Arm
    source: TimedOnPolicy
    points: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.evaluate(trainer, pl_module)
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seconds += time.process_time() - self.started
        self.tokens += sum(len(rollout.response_ids) for rollout in pl_module.last_rollouts)
        if trainer.global_step % EVALUATE_EVERY == 0:
            self.evaluate(trainer, pl_module)
            bar = BARS[self.arm.bar] if self.arm.bar else Bar(0.0, 1.0)
            arrived = self.points[-1]["kl"] <= bar.kl and self.points[-1]["accuracy"] >= bar.accuracy
            trainer.should_stop = arrived or self.seconds > self.arm.max_seconds
        self.started = time.process_time()

    def evaluate(self, trainer: Trainer, module: Any) -> None:
        self.points.append(
            {
                "step": trainer.global_step,
                "seconds": round(self.seconds, 2),
                "generation_seconds": round(self.source.seconds, 2),
                "tokens": self.tokens,
                **measure(trainer, module),
            }
        )
        if os.environ.get("SHOW"):
            print(self.arm.name, self.points[-1], flush=True)


def measure(trainer: Any, module: OPDModule) -> dict[str, float]:
    """Reverse KL to the teacher per token, sampled accuracy and response length on the held-out problems."""
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
    return {"kl": round(total / count, 5), "accuracy": round(accuracy, 4), "length": round(count / len(rollouts), 1)}


def run(arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, which decides prompts and samples."""
    seed_everything(seed, verbose=False)
    source = OneRound(arm.num_rollouts // PROMPTS_PER_STEP) if arm.method == "one-round" else TimedOnPolicy()
    trajectory = Trajectory(arm, source)
    module = OPDModule(
        HFStudent(STUDENT),
        HFTeacher(TEACHER, dtype="float32"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arm.lr, weight_decay=0.0),
        max_tokens_per_micro_batch=2048,
        top_k_metrics=0,
    )
    data = OPDDataModule(LedgerTask(), source=source, sampling=SAMPLING, prompts_per_step=PROMPTS_PER_STEP, seed=seed)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arm.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[trajectory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if trainer.received_sigterm:
        raise SystemExit("stopped in the middle of a run, which is not recorded")
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"arm": arm.name, "seed": seed, "settings": asdict(arm) | facts, "trajectory": trajectory.points}


def main(groups: list[str]) -> None:
    """Run what is missing and append a line per run."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    for group in groups or list(GROUPS):
        seeds, arms = GROUPS[group]
        for seed in seeds:
            for arm in arms:
                lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
                if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in map(json.loads, lines)}:
                    continue
                result = run(arm, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(time.strftime("%H:%M:%S"), group, arm.name, f"seed={seed}", result["trajectory"][-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
