"""What effopd_speedup.py compares: problems with their bars, methods, and groups of arms with their seeds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from effopd_baselines import AlphaOPD
from effopd_ideas import AccuracyOnLevels, AlwaysBack, GradientEffOPD, MomentsEffOPD

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.callbacks.effopd_scores import TaskAccuracy, TeacherKL, TeacherKLOnFixedRollouts
from opd_lightning.interfaces import Teacher
from opd_lightning.teachers import ExtrapolatedTeacher


@dataclass(frozen=True)
class Target:
    """A training problem and the bar that ends a run.

    Attributes:
        levels: Levels of `ArithmeticTask` trained on and held out.
        kl: Reverse KL to the teacher on held-out problems, nats per token, at most.
        accuracy: Sampled accuracy on them, at least.
        num_held_out: How many.
    """

    levels: tuple[int, ...]
    kl: float
    accuracy: float
    num_held_out: int = 128


# Each bar was chosen from plain runs before any run with EffOPD on its problem, and then frozen.
TARGETS = {
    "near": Target(levels=(1, 2), kl=0.035, accuracy=0.87),
    "far": Target(levels=(1, 2), kl=0.0015, accuracy=0.97, num_held_out=256),
}


def make_teacher() -> Teacher:
    """The sandbox's."""
    return HFTeacher("sandbox:teacher", dtype="float32")


def extrapolated(scale: float) -> Callable[[], Teacher]:
    """The target of ExOPD, with the initial student as reference."""

    def make() -> Teacher:
        return ExtrapolatedTeacher(
            make_teacher(), HFTeacher("sandbox:student", dtype="float32"), scale, normalized=True
        )

    return make


@dataclass(frozen=True)
class Method:
    """How a run differs from plain OPD.

    Attributes:
        make_callback: Makes `EffOPD`, or something else with a `last_search`; None searches nothing.
        make_teacher: Makes what is distilled from.
    """

    make_callback: Callable[[], Any] | None = None
    make_teacher: Callable[[], Teacher] = field(default=make_teacher)


TWO_SIDED: dict[str, Any] = {"schedule": 4, "backward": (-0.5,)}
DENSE = [1, 2, *range(4, 97, 4)]  # as the paper begins, and no long pause later
DOUBLING = (1.0, 2.0, 4.0, 8.0)
FINE = (0.5, 1.0, 2.0, 4.0, 8.0)
TEACHER_ACCURACY = 0.97  # what AlphaOPD aims at
DENSE_DOUBLING: dict[str, Any] = {"schedule": DENSE, "candidates": DOUBLING}


def on_fixed(kind: type[EffOPD] = EffOPD, num_rollouts: int = 50, **options: Any) -> Method:
    """EffOPD of this kind with the score that generates nothing."""
    return Method(lambda: kind(TeacherKLOnFixedRollouts(num_rollouts), **options))


METHODS: dict[str, Method] = {
    "opd": Method(),
    "effopd-accuracy": Method(lambda: EffOPD(TaskAccuracy(50))),
    "effopd-kl": Method(lambda: EffOPD(TeacherKL(50))),
    "effopd-fixed": on_fixed(),
    "two-sided-kl": Method(lambda: EffOPD(TeacherKL(50), **TWO_SIDED)),
    "dense-fixed": on_fixed(**DENSE_DOUBLING),
    "dense-two-sided-fixed": on_fixed(**DENSE_DOUBLING, backward=(-0.5,)),
    "fine-kl": Method(lambda: EffOPD(TeacherKL(50), candidates=FINE, **TWO_SIDED)),
    "fine-fixed": on_fixed(candidates=FINE, **TWO_SIDED),
    "two-sided-fixed": on_fixed(**TWO_SIDED),
    "always-back": Method(lambda: EffOPD(AlwaysBack(), **TWO_SIDED)),
    "alphaopd-accuracy": Method(lambda: AlphaOPD(TaskAccuracy(50), TEACHER_ACCURACY)),
    "alphaopd-kl-rescaled": Method(lambda: AlphaOPD(TeacherKL(50), 0.0, rescale=True)),
    "exopd-1.25": Method(make_teacher=extrapolated(1.25)),
    "exopd-1.5": Method(make_teacher=extrapolated(1.5)),
    "effopd-accuracy-10": Method(lambda: EffOPD(TaskAccuracy(10))),
    "effopd-accuracy-200": Method(lambda: EffOPD(TaskAccuracy(200))),
    "effopd-fixed-10": on_fixed(num_rollouts=10),
    "effopd-accuracy-level-1": Method(lambda: EffOPD(AccuracyOnLevels([1]))),
    "effopd-accuracy-level-2": Method(lambda: EffOPD(AccuracyOnLevels([2]))),
    "effopd-accuracy-level-3": Method(lambda: EffOPD(AccuracyOnLevels([3]))),
    "adaptive-fixed": on_fixed(schedule="adaptive", candidates=DOUBLING),
    "moments-along-fixed": on_fixed(MomentsEffOPD, **DENSE_DOUBLING),
    "moments-forgotten-fixed": on_fixed(MomentsEffOPD, **DENSE_DOUBLING, forget=True),
    "gradient-fixed": on_fixed(GradientEffOPD, **DENSE_DOUBLING),
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
        target: Key of TARGETS.
        evaluate_every: Steps between evaluations near the bar.
    """

    method: str
    lr: float
    warmup: int = 0
    decay: int = 0
    prompts: int = 64
    averaged: bool = False
    max_steps: int = 48
    target: str = "near"
    evaluate_every: int = 2

    @property
    def name(self) -> str:
        """For example `opd lr=0.0005 prompts=64 warmup=4`."""
        extras = [f"{key}={value}" for key in ("warmup", "decay") if (value := getattr(self, key))]
        return " ".join([self.method, f"lr={self.lr:g}", f"prompts={self.prompts}", *extras])


def arms(*methods: str, **options: Any) -> list[Arm]:
    """One arm per method, alike otherwise."""
    return [Arm(method, **options) for method in methods]


SLOW: dict[str, Any] = {"lr": 5e-5, "max_steps": 96}
HALF_SLOW: dict[str, Any] = {"lr": 1e-4, "max_steps": 64}
FAR: dict[str, Any] = {"prompts": 256, "max_steps": 64, "target": "far", "evaluate_every": 4}
PAPER_RATIO: dict[str, Any] = {"prompts": 1024, "evaluate_every": 1}
PAPER = ("effopd-accuracy", "effopd-kl", "effopd-fixed")
FIRST_FIVE, FIRST_THREE = range(5), range(3)
# Seconds are compared within a session only. Seeds 0 to 4 belong to the first, later seeds to the second.
FRESH_FIVE, FRESH_THREE = range(5, 10), range(5, 8)
GROUPS: dict[str, tuple[range, list[Arm]]] = {  # seeds, arms; most important first
    "cautious": (FIRST_FIVE, arms("opd", *PAPER, **HALF_SLOW)),
    "slow": (FIRST_FIVE, arms("opd", "effopd-kl", "effopd-fixed", "effopd-accuracy", **SLOW)),
    "remedy": (FIRST_FIVE, [*arms("dense-fixed", **SLOW), *arms("dense-fixed", **HALF_SLOW)]),
    "tuned": (
        FIRST_THREE,
        [
            Arm("opd", 5e-4, averaged=True),
            *arms("two-sided-kl", "two-sided-fixed", lr=5e-4),
            Arm("opd", 1e-3, warmup=4, decay=24, averaged=True, max_steps=24),
            Arm("two-sided-kl", 1e-3),
            Arm("opd", 1e-3, averaged=True),
            Arm("opd", 3e-4),
        ],
    ),
    "large": (
        FIRST_THREE,
        [
            *arms("opd", "two-sided-kl", lr=1e-3, prompts=256, max_steps=24),
            *arms("opd", "dense-two-sided-fixed", lr=5e-4, prompts=256, max_steps=24),
        ],
    ),
    "every-4": (FIRST_FIVE, arms("two-sided-kl", "fine-fixed", "fine-kl", **HALF_SLOW)),
    "no-harm": (
        FIRST_THREE,
        [
            Arm("dense-two-sided-fixed", 5e-4),
            Arm("opd", 2e-3, averaged=True, max_steps=32),
            Arm("two-sided-kl", 2e-3, max_steps=32),
            Arm("effopd-accuracy", 5e-4),
        ],
    ),
    "confirm": (range(5, 12), arms("opd", "dense-fixed", **SLOW)),
    "too-large": (
        FRESH_FIVE,
        [
            Arm("opd", 2e-3, averaged=True, max_steps=32),
            *arms("two-sided-kl", "dense-two-sided-fixed", lr=2e-3, max_steps=32),
            Arm("opd", 5e-4, averaged=True),
            Arm("dense-two-sided-fixed", 5e-4),
            Arm("always-back", 2e-3, max_steps=32),
        ],
    ),
    "baselines": (
        FRESH_THREE,
        [
            *arms("alphaopd-accuracy", "exopd-1.25", **SLOW),
            *arms("opd", "alphaopd-accuracy", "exopd-1.25", **HALF_SLOW),
        ],
    ),
    "baselines-more": (
        FRESH_THREE,
        [
            *arms("exopd-1.25", "exopd-1.5", lr=5e-4),
            *arms("alphaopd-kl-rescaled", "exopd-1.5", **HALF_SLOW),
            *arms("alphaopd-kl-rescaled", **SLOW),
        ],
    ),
    "sizes": (
        FRESH_THREE,
        [
            *arms("effopd-accuracy-10", "effopd-accuracy", "effopd-accuracy-200", **SLOW),
            *arms("effopd-fixed-10", "effopd-fixed", **SLOW),
        ],
    ),
    "difficulty": (FRESH_THREE, arms(*(f"effopd-accuracy-level-{level}" for level in (1, 2, 3)), **SLOW)),
    "adaptive": (FRESH_FIVE, [*arms("adaptive-fixed", **SLOW), Arm("adaptive-fixed", 5e-4)]),
    "ideas": (FRESH_THREE, arms("moments-along-fixed", "moments-forgotten-fixed", "gradient-fixed", **SLOW)),
    "paper-ratio": (  # 50 scored prompts beside 1,024 rollouts; minutes per run, hence two seeds
        range(5, 7),
        [
            *arms("effopd-kl", "opd", lr=1e-4, max_steps=64, **PAPER_RATIO),
            *arms("opd", "two-sided-kl", lr=5e-4, max_steps=16, **PAPER_RATIO),
            *arms("effopd-accuracy", lr=1e-4, max_steps=64, **PAPER_RATIO),
        ],
    ),
    "far-explore": (range(1), [Arm("opd", lr, averaged=True, **FAR) for lr in (1e-3, 5e-4, 2e-3)]),
    "far": (
        range(1, 4),
        [
            Arm("opd", 1e-3, averaged=True, **FAR),
            *arms("dense-two-sided-fixed", lr=1e-3, **FAR),
            *arms("dense-two-sided-fixed", lr=2e-3, **FAR),
        ],
    ),
    "far-more": (
        range(1, 2),
        [
            *arms("two-sided-kl", "always-back", lr=2e-3, **FAR),
            Arm("opd", 1e-3, warmup=4, decay=48, averaged=True, **FAR),
            Arm("opd", 2e-3, warmup=4, decay=64, averaged=True, **FAR),
        ],
    ),
}
