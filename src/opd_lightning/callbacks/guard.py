"""`Guard`: watches one number of a run, and warns, shortens the horizon or stops when it goes where it should not.

It logs the number it judges (`guard/...`), smoothed over some steps (`HeldOutGuard` does neither), keeps what it
remembers in the checkpoint, and acts once each time a threshold is crossed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.rollouts.horizon import StepSampling
from opd_lightning.training.datamodule import OPDDataModule

Action = Literal["warn", "shorten", "stop"]


class Guard(Callback, ABC):
    """Judges the mean of the last steps beside that of the first ones and the best since.

    Args:
        action: "warn"; "shorten": from the next step that is not settled yet (the second after this one) at most half
            as many response tokens are generated and trained on, for good, which needs a `data.horizon`; or "stop": no
            further step is trained. Checkpoints stay as they are; the message names the best.
        window: Steps that are averaged.

    Attributes:
        signal: Name of what is logged, behind ``guard/``.
        best_is_highest: Whether high numbers are good.

    Raises:
        ValueError: The action is none of these, or the window is below 1; when fit starts also when there is no horizon
            to shorten.
    """

    signal: str
    best_is_highest: bool = False

    def __init__(self, action: Action = "warn", window: int = 5) -> None:
        if action not in get_args(Action):
            raise ValueError(
                f"{type(self).__name__}.action: expected one of {', '.join(get_args(Action))}, got {action!r}."
            )
        if window < 1:
            raise ValueError(f"{type(self).__name__}.window: expected an integer of at least 1, got {window}.")
        self.action = action
        self.window = window
        self.recent: list[float] = []
        self.first: float | None = None
        self.best: float | None = None
        self.is_alarmed = False
        self._is_blind = False

    @abstractmethod
    def measure(self, trainer: Trainer, outputs: Any) -> float | None:
        """The number of the step that has been trained, the same on all processes; None where it is not known."""

    @abstractmethod
    def complaint(self, now: float, first: float, best: float) -> str | None:
        """What is wrong, in words; None where nothing is.

        Args:
            now: Mean of the last `window` steps.
            first: Mean of the first `window` steps.
            best: Best mean so far, this one included.
        """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.action == "shorten" and step_sampling_of(trainer) is None:
            raise ValueError(
                f"{type(self).__name__}.action: 'shorten' needs a horizon to shorten, and data.horizon is null. Set it,"
                " for example {class_path: ConstantHorizon, init_args: {tokens: 1024}}, or take 'warn' or 'stop'."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        value = self.measure(trainer, outputs)
        if value is None and self.best is None and not self.recent:
            self.miss(self.signal)
        elif value is not None and math.isfinite(value):
            self.judge(value, trainer, pl_module)

    def miss(self, name: str) -> None:
        """Say, once, that a number which this guard needs is not there."""
        if not self._is_blind:
            self._is_blind = True
            rank_zero_warn(
                f"{type(self).__name__}: {name} is not known in this run, so this guard does not watch anything. See"
                " docs/diagnose.md for what it needs, or leave it out."
            )

    def judge(self, value: float, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take one more number in, log the mean, and act if need be."""
        self.recent = [*self.recent, value][-self.window :]
        if len(self.recent) < self.window:
            return
        now = math.fsum(self.recent) / self.window
        self.first = now if self.first is None else self.first
        choose = max if self.best_is_highest else min
        self.best = now if self.best is None else choose(self.best, now)
        pl_module.log(f"guard/{self.signal}", now, batch_size=1)
        self.ring(self.complaint(now, self.first, self.best), trainer)

    def ring(self, complaint: str | None, trainer: Trainer) -> None:
        """Act on a complaint, once until there is none any more."""
        if complaint is not None and not self.is_alarmed:
            self.act(complaint, trainer)
        self.is_alarmed = complaint is not None

    def act(self, complaint: str, trainer: Trainer) -> None:
        """Say it, and shorten the horizon or stop the run if that was asked for."""
        words = f"{type(self).__name__}, step {trainer.global_step}: {complaint}"
        if self.action == "shorten" and (sampling := step_sampling_of(trainer)) is not None:
            before, after = sampling.shorten()
            words += f" The horizon is cut from {before} to {after} tokens."
        if self.action == "stop":
            trainer.should_stop = True
            words += f" The run stops here. {best_checkpoint(trainer)}"
        say(trainer, words)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "first": self.first, "best": self.best, "is_alarmed": self.is_alarmed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent, self.first, self.best = list(state_dict["recent"]), state_dict["first"], state_dict["best"]
        self.is_alarmed = state_dict["is_alarmed"]


def step_sampling_of(trainer: Trainer) -> StepSampling | None:
    """What says how many tokens a step generates; None where there is no horizon."""
    data = getattr(trainer, "datamodule", None)
    return data.step_sampling if isinstance(data, OPDDataModule) and data.horizon is not None else None


def best_checkpoint(trainer: Trainer) -> str:
    """Which checkpoint to go back to, in words."""
    kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    for each in kept:
        if each.monitor is not None and each.best_model_path:
            return f"The best checkpoint by {each.monitor} is {each.best_model_path}."
    where = [str(each.dirpath) for each in kept if each.best_model_path]
    if not where:
        return "No checkpoint has been written yet."
    return f"Checkpoints are in {where[0]}; a ModelCheckpoint with a `monitor` would know the best."


def logged(trainer: Trainer, name: str) -> float | None:
    """A metric as it was logged last; None where there is none."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def check_range(guard: Guard, name: str, value: float, *, low: float, high: float = math.inf) -> None:
    """Refuse a threshold outside its range.

    Raises:
        ValueError: It is.
    """
    if not low < value < high:
        bounds = f"above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        raise ValueError(f"{type(guard).__name__}.{name}: expected a number {bounds}, got {value}.")
