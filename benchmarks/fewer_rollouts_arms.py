"""What fewer_rollouts.py compares: problems with their bars, and what a run may differ in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from effopd_ideas import AlwaysBack
from effopd_speedup_arms import TARGETS
from long_sandbox import BARS, MAX_NEW_TOKENS, NUM_HELD_OUT

from opd_lightning import EffOPD, TeacherKLOnNewRollouts
from opd_lightning.backends.hf import LoraSettings
from opd_lightning.interfaces import Advantage, Objective, RolloutSource, Task
from opd_lightning.objectives import DivergenceObjective, SampledTokenObjective
from opd_lightning.rollouts.horizon import GrowingHorizon, Horizon
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.rollouts.reuse import Reuse
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.tasks.ledger import LedgerTask


@dataclass(frozen=True)
class Target:
    """A training problem and the bar that ends a run.

    Attributes:
        student: What is trained.
        teacher: What it is distilled from.
        make_task: Makes the problems.
        max_new_tokens: Longest answer.
        kl: Reverse KL to the teacher on held-out problems, nats per token, at most.
        accuracy: Sampled accuracy on them, at least.
        num_held_out: How many.
        no_use_above: A loss in training at which a run need not be evaluated to be known as not there yet.
        max_seconds: Processor seconds after which a run gives up.
        max_tokens: Padded tokens of a micro-batch.
        num_final: Held-out problems that are answered once more when the run is over; 0 for none.
    """

    student: str
    teacher: str
    make_task: Callable[[], Task]
    max_new_tokens: int
    kl: float
    accuracy: float
    num_held_out: int
    no_use_above: float
    max_seconds: float
    max_tokens: int = 16384
    num_final: int = 0


def short(name: str, no_use_above: float, max_seconds: float) -> Target:
    """A bar of the EffOPD benchmark, frozen there."""
    bar = TARGETS[name]
    return Target(
        "sandbox:student",
        "sandbox:teacher",
        lambda: ArithmeticTask(levels=bar.levels),
        max_new_tokens=48,
        kl=bar.kl,
        accuracy=bar.accuracy,
        num_held_out=bar.num_held_out,
        no_use_above=no_use_above,
        max_seconds=max_seconds,
    )


LONG = Target(
    "sandbox:long-student",
    "sandbox:long-teacher",
    LedgerTask,
    max_new_tokens=MAX_NEW_TOKENS,
    kl=BARS["far"].kl,  # the near one is on the way
    accuracy=BARS["far"].accuracy,
    num_held_out=NUM_HELD_OUT,
    no_use_above=0.05,
    max_seconds=300,
    max_tokens=2048,
)
PROBLEMS = {
    "near": short("near", no_use_above=0.1, max_seconds=60),
    "far": short("far", no_use_above=0.01, max_seconds=120),
    "long": LONG,
    # to the far divergence, and there enough problems to tell accuracies apart
    "long-arrived": replace(LONG, make_task=lambda: LedgerTask(num_validation=1024), accuracy=0.0, num_final=1024),
}


class Penalty(Advantage):
    """-1 for every sampled token that the teacher finds less likely than the student does, 0 for the others."""

    def __call__(self, rewards: torch.Tensor, *_: Any) -> torch.Tensor:
        """Whatever the size of the reward."""
        return -(rewards < 0).to(rewards.dtype)


@dataclass(frozen=True)
class Arm:
    """One setting; `name` identifies it in the results.

    Attributes:
        rollouts: Rollouts of a round: of one generation.
        lr: Learning rate of AdamW.
        mini_batches: Optimiser steps of one pass over a round.
        passes: How often each rollout is trained on: a number, or "adaptive".
        max_kl: End a round at this distance; None never does.
        search: Ends rounds with EffOPD's search on so many fresh rollouts; 0 searches nothing.
        blind: Goes back by this share of every round, unasked.
        horizon: Only so many first tokens of an answer are generated and trained on, one and a half times as many in
            every further round; 0 takes whole answers.
        average: Decay per update of an average of the weights, which then has to reach the bar; 0 for none.
        decay: Update at which a linear decay of the rate to zero ends; 0 keeps the rate.
        is_behind: Rollouts come from the weights of one round before.
        penalty: Trains with `Penalty` in place of the divergence over all tokens.
        lora: Rank of an adapter that is trained in place of all weights; 0 for none.
        vllm: Generates with vLLM in this process.
        ahead: Generates with vLLM in a child, each step's rollouts while the step before trains.
        evaluate_every: Held-out problems are answered after rounds that end at a multiple of so many updates.
        max_updates: Give up here.
        target: Key of PROBLEMS.
    """

    rollouts: int
    lr: float
    mini_batches: int = 1
    passes: int | str = 1
    max_kl: float | None = None
    search: int = 0
    blind: float = 0.0
    horizon: int = 0
    average: float = 0.0
    decay: int = 0
    is_behind: bool = False
    penalty: bool = False
    lora: int = 0
    vllm: bool = False
    ahead: bool = False
    evaluate_every: int = 1
    max_updates: int = 400
    target: str = "far"

    @property
    def name(self) -> str:
        """For example `far rollouts=256 lr=0.0002 U=4x8 max_kl=0.1`."""
        reuse = f" U={self.passes}x{self.mini_batches}" if (self.passes, self.mini_batches) != (1, 1) else ""
        keys = (
            "max_kl",
            "search",
            "blind",
            "horizon",
            "average",
            "decay",
            "is_behind",
            "penalty",
            "lora",
            "vllm",
            "ahead",
        )
        extras = [f"{key}={value}" for key in keys if (value := getattr(self, key))]
        return " ".join([f"{self.target} rollouts={self.rollouts} lr={self.lr:g}{reuse}", *extras])

    def make_source(self) -> RolloutSource:
        """Where rollouts come from."""
        if self.mini_batches == self.passes == 1:
            return OneStepAhead() if self.ahead else OnPolicy()
        return Reuse(self.mini_batches, self.passes, max_kl=self.max_kl)

    def make_horizon(self) -> Horizon | None:
        """How long answers are."""
        if not self.horizon:
            return None
        updates = self.mini_batches * (1 if self.passes == "adaptive" else int(self.passes))
        return GrowingHorizon(self.horizon, every=updates, add=self.horizon // 2)

    def make_objective(self) -> Objective:
        """What is minimised."""
        return SampledTokenObjective(advantage=Penalty()) if self.penalty else DivergenceObjective()

    def student_options(self) -> dict[str, Any]:
        """Beside the path."""
        return {"lora": LoraSettings(r=self.lora)} if self.lora else {}

    def make_callbacks(self) -> list[Any]:
        """The search at the end of rounds."""
        if self.blind:
            return [EffOPD(AlwaysBack(), schedule="rounds", candidates=(1.0,), backward=(-self.blind,))]
        if not self.search:
            return []
        score = TeacherKLOnNewRollouts(self.search)
        return [EffOPD(score, schedule="rounds", candidates=(0.5, 1.0), backward=(-0.25, -0.5))]
