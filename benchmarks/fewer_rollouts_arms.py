"""What fewer_rollouts.py compares: problems with their bars, arms, and groups of arms with their seeds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from effopd_speedup_arms import TARGETS

from opd_lightning import EffOPD, TeacherKLOnNewRollouts
from opd_lightning.interfaces import RolloutSource, Task
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.reuse import Reuse
from opd_lightning.tasks import ArithmeticTask


@dataclass(frozen=True)
class Target:
    """A training problem and the bar that ends a run.

    Attributes:
        sandbox: Its pair: the models `<sandbox>:student` and `<sandbox>:teacher`.
        make_task: Makes the problems.
        max_new_tokens: Longest answer.
        kl: Reverse KL to the teacher on held-out problems, nats per token, at most.
        accuracy: Sampled accuracy on them, at least.
        num_held_out: How many.
    """

    student: str
    teacher: str
    make_task: Callable[[], Task]
    max_new_tokens: int
    kl: float
    accuracy: float
    num_held_out: int


def short(name: str) -> Target:
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
    )


PROBLEMS = {"near": short("near"), "far": short("far")}


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
        horizon: Only so many first tokens of an answer are generated and trained on; 0 takes whole answers.
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
    horizon: int = 0
    evaluate_every: int = 1
    max_updates: int = 400
    target: str = "far"

    @property
    def name(self) -> str:
        """For example `far rollouts=256 lr=0.0002 U=4x8 max_kl=0.1`."""
        reuse = f" U={self.passes}x{self.mini_batches}" if (self.passes, self.mini_batches) != (1, 1) else ""
        extras = [f"{key}={value}" for key in ("max_kl", "search", "horizon") if (value := getattr(self, key))]
        return " ".join([f"{self.target} rollouts={self.rollouts} lr={self.lr:g}{reuse}", *extras])

    def make_source(self) -> RolloutSource:
        """Where rollouts come from."""
        if self.mini_batches == self.passes == 1:
            return OnPolicy()
        return Reuse(self.mini_batches, self.passes, max_kl=self.max_kl)

    def make_callbacks(self) -> list[Any]:
        """The search at the end of rounds."""
        if not self.search:
            return []
        return [
            EffOPD(
                TeacherKLOnNewRollouts(self.search), schedule="rounds", candidates=(0.5, 1.0), backward=(-0.25, -0.5)
            )
        ]


FRESH_FIVE = range(30, 35)
NEAR: dict[str, Any] = {"target": "near", "max_updates": 128, "evaluate_every": 2}
REUSED = Arm(1024, 2e-4, mini_batches=16, passes=4)
REUSED_SMALL = Arm(256, 2e-4, mini_batches=8, passes=4)
CHECKED: dict[str, Any] = {"max_kl": 0.2, "search": 64}
GROUPS: dict[str, tuple[range, list[Arm]]] = {  # seeds, arms; most important first
    "far": (
        FRESH_FIVE,
        [
            REUSED,
            REUSED_SMALL,
            Arm(256, 1e-3, evaluate_every=4),
            Arm(64, 3e-4, evaluate_every=8),
            Arm(32, 2e-4, evaluate_every=16),
        ],
    ),
    "near": (
        FRESH_FIVE,
        [
            *(Arm(64, lr, **NEAR) for lr in (3e-4, 5e-4, 1e-3)),
            *(Arm(32, lr, **NEAR) for lr in (3e-4, 5e-4)),
            Arm(64, 3e-4, mini_batches=4, passes=4, **NEAR),
            Arm(64, 3e-4, mini_batches=4, passes=4, **NEAR, **CHECKED),
        ],
    ),
    "checked": (
        FRESH_FIVE,
        [
            replace(REUSED, **CHECKED),
            replace(REUSED_SMALL, **CHECKED),
            replace(REUSED_SMALL, passes="adaptive", **CHECKED),
        ],
    ),
    "controls": (
        FRESH_FIVE,
        [
            Arm(3072, 2e-4, mini_batches=48, passes=8, max_updates=384),  # one round, never again on-policy
            replace(REUSED_SMALL, passes=1),  # several updates without a second pass
        ],
    ),
    "far-paper": (range(30, 33), [Arm(1024, 1e-3)]),  # the EffOPD paper's number of rollouts; minutes per run
}
