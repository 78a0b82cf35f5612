"""Is the long sandbox what it is for? On-policy distillation should arrive, late, where one stale round does not.

(1) `one-round` arms train on 3,072 rollouts of the initial student, over and over, and never generate again.
(2) `opd` arms are plain on-policy distillation, AdamW at constant rates, 64 rollouts a step.
(3) Every evaluation says how many processor seconds have gone into generation, and how many into everything.

A run ends at the first evaluation that reaches its bar, or when its arm gives up. Held-out evaluation (fixed problems,
fixed sampling seeds, own random state) is outside the clock. One line per run is appended to the results; runs already
there are skipped. Seconds are processor seconds of the process. Other benchmarks import `BARS`.

Hardware: one x86-64 core and 1 GB.
Command:  python benchmarks/long_sandbox.py [GROUP ...]    (no group: all)
"""

import copy
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from sandbox_runs import RESULTS as FOLDER
from sandbox_runs import Trajectory, facts, fit, run_missing

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.interfaces import LiveStudent, Rollout, RolloutBatch, Sampling, StepPrompts
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.tasks.ledger import LedgerTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = FOLDER / "long_sandbox_cpu-2core.jsonl"
STUDENT = os.environ.get("LONG_STUDENT", "sandbox:long-student")
TEACHER = os.environ.get("LONG_TEACHER", "sandbox:long-teacher")
PROMPTS_PER_STEP = 64
NUM_HELD_OUT = 64
EVALUATE_EVERY = 10
MAX_NEW_TOKENS = 128


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


class Costs(Trajectory):
    """What an arm has spent at every tenth step."""

    def __init__(self, arm: Arm, source: TimedOnPolicy) -> None:
        super().__init__(NUM_HELD_OUT)
        self.arm, self.source, self.tokens = arm, source, 0

    def account(self, trainer: Trainer, module: Any, outputs: Any, batch: Any) -> bool:
        self.tokens += sum(len(rollout.response_ids) for rollout in module.last_rollouts)
        return trainer.global_step % EVALUATE_EVERY == 0

    def spent(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "step": trainer.global_step,
            "seconds": round(self.seconds, 2),
            "generation_seconds": round(self.source.seconds, 2),
            "tokens": self.tokens,
        }

    def is_over(self, points: Sequence[Mapping[str, Any]]) -> bool:
        bar = BARS[self.arm.bar] if self.arm.bar else Bar(0.0, 1.0)
        there = points[-1]["kl"] <= bar.kl and points[-1]["accuracy"] >= bar.accuracy
        return bool(there or self.seconds > self.arm.max_seconds)


def run(arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, which decides prompts and samples."""
    seed_everything(seed, verbose=False)
    source = OneRound(arm.num_rollouts // PROMPTS_PER_STEP) if arm.method == "one-round" else TimedOnPolicy()
    costs = Costs(arm, source)
    module = OPDModule(
        HFStudent(STUDENT),
        HFTeacher(TEACHER, dtype="float32"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arm.lr, weight_decay=0.0),
        max_tokens_per_micro_batch=2048,
        top_k_metrics=0,
    )
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    data = OPDDataModule(LedgerTask(), source=source, sampling=sampling, prompts_per_step=PROMPTS_PER_STEP, seed=seed)
    fit(module, data, [costs], arm.max_steps)
    return {"settings": asdict(arm) | facts(), "trajectory": costs.points}


if __name__ == "__main__":
    run_missing(GROUPS, sys.argv[1:], run, lambda _: RESULTS)
