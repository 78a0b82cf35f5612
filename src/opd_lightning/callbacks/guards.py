"""Guards against the ways in which runs are known to fail: entropy, overlap, length, late tokens, held-out problems.

Thresholds are stated with their source; those marked as our choice are orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from typing_extensions import override

from opd_lightning.callbacks.guard import Action, Guard, check_range, logged
from opd_lightning.interfaces import TrainedRollout


class GrowthGuard(Guard):
    """Judges how many times the number of the first steps it has become.

    Args:
        most: Alarm above so many times it.
        action: What to do.
        window: Steps that are averaged.
    """

    def __init__(self, most: float = 2.0, action: Action = "warn", window: int = 5) -> None:
        super().__init__(action, window)
        check_range(self, "most", most, low=1.0)
        self.most = most


class EntropyGuard(GrowthGuard):
    """Watches the student's entropy: growing away from where it began, or far below the teacher's.

    A replication of arXiv 2604.13016 diverged within 20 steps as the student's entropy rose from 1.14 to 3.18 nats, the
    teacher's at these states with it; a stable run went from 0.31 to 0.23. The lower bound is our choice: a student
    that follows its teacher ends near the teacher's entropy and not below it.

    Args:
        most: Alarm above so many times the entropy of the first steps, if it is more than 0.1 nats above it as well.
        least: Alarm below this share of the teacher's entropy, where that is known and above 0.01 nats.
        action: What to do.
        window: Steps that are averaged.
    """

    signal = "student_entropy"

    def __init__(self, most: float = 2.0, least: float = 0.25, action: Action = "warn", window: int = 5) -> None:
        super().__init__(most, action, window)
        check_range(self, "least", least, low=0.0, high=1.0)
        self.least = least
        self.teachers: list[float] = []  # of the same steps as `recent`; NaN where it was not known

    @override
    def measure(self, trainer: Trainer, outputs: Any) -> float | None:
        student, teacher = logged(trainer, "train/student_entropy"), logged(trainer, "train/teacher_entropy")
        if student is not None and math.isfinite(student):
            self.teachers = [*self.teachers, math.nan if teacher is None else teacher][-self.window :]
        return student

    @override
    def complaint(self, now: float, first: float, best: float) -> str | None:
        if now > self.most * first and now > first + 0.1:
            return f"the student's entropy has grown from {first:.3g} to {now:.3g} nats per token."
        teacher = sum(self.teachers) / len(self.teachers)  # NaN, and so no complaint, unless known in all these steps
        if teacher > 0.01 and now < self.least * teacher:
            return f"the student's entropy has fallen to {now:.3g} nats per token, the teacher's is {teacher:.3g}."
        return None

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"teachers": self.teachers}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.teachers = list(state_dict.get("teachers", ()))  # an older checkpoint has none: the window fills anew


class OverlapGuard(Guard):
    """Watches the overlap of the top-k lists: it rises in runs that succeed and falls before they break.

    In arXiv 2604.13016 it rose from 0.72 to 0.92 in a run that succeeded, with dips of about 0.03; a larger fall is our
    choice of what is no dip.

    Args:
        most_lost: Alarm when it is so far below its best.
        action: What to do.
        window: Steps that are averaged.
    """

    signal = "overlap_ratio"
    best_is_highest = True

    def __init__(self, most_lost: float = 0.1, action: Action = "warn", window: int = 5) -> None:
        super().__init__(action, window)
        check_range(self, "most_lost", most_lost, low=0.0, high=1.0)
        self.most_lost = most_lost

    @override
    def measure(self, trainer: Trainer, outputs: Any) -> float | None:
        return logged(trainer, "train/overlap_ratio")

    @override
    def complaint(self, now: float, first: float, best: float) -> str | None:
        if best - now > self.most_lost:
            return f"the overlap ratio has fallen from {best:.3f} at its best to {now:.3f}."
        return None


class LengthGuard(GrowthGuard):
    """Watches the length of responses; that they double without being asked to is our choice of a sign.

    A `data.horizon` that grows asks them to: leave this guard out then. One that is reached cuts what would be seen.

    Args:
        most: Alarm above so many times the length of the first steps.
        action: What to do.
        window: Steps that are averaged.
    """

    signal = "response_length"

    @override
    def measure(self, trainer: Trainer, outputs: Any) -> float | None:
        return logged(trainer, "train/response_length")

    @override
    def complaint(self, now: float, first: float, best: float) -> str | None:
        if now > self.most * first:
            return f"responses have grown from {first:.0f} to {now:.0f} tokens."
        return None


class LateEntropyGuard(GrowthGuard):
    """Watches the student's entropy in the last quarter of the positions, beside that in the first half.

    arXiv 2604.13016 (section 5) saw high entropy begin at the ends of long responses and spread towards their
    beginnings before a run broke; it prints no numbers, so the factor is our choice. Needs `OPDModule` and the fact
    `student_entropy` (`model.top_k_metrics` above 0).

    Args:
        most: Alarm above so many times the ratio of the first steps, if the ratio is above 1 as well.
        action: What to do.
        window: Steps that are averaged.
    """

    signal = "late_entropy_ratio"

    @override
    def measure(self, trainer: Trainer, outputs: Any) -> float | None:
        rollouts = outputs["facts"].rollouts if isinstance(outputs, Mapping) and "facts" in outputs else ()
        sums = entropy_sums([each for each in rollouts if "student_entropy" in each.facts])
        early, num_early, late, num_late = trainer.strategy.reduce(
            sums.to(trainer.strategy.root_device), reduce_op="sum"
        ).tolist()
        return (late / num_late) / (early / num_early) if num_early and num_late and early > 0 else None

    @override
    def complaint(self, now: float, first: float, best: float) -> str | None:
        if now > max(1.0, self.most * first):
            return (
                f"entropy late in a response was {first:.2f} times that of its first half, now it is {now:.2f} times."
            )
        return None


def entropy_sums(rollouts: Sequence[TrainedRollout]) -> torch.Tensor:
    """Sum and number of entropies in the first half of each response, and sum and number in its last quarter."""
    sums = torch.zeros(4, dtype=torch.float64)
    for each in rollouts:
        places, entropies = each.rollout.trained_positions, each.facts["student_entropy"].double()
        length = len(each.rollout.response_ids)
        for offset, inside in ((0, 2 * places < length), (2, 4 * places >= 3 * length)):
            sums[offset] += entropies[inside].sum()
            sums[offset + 1] += inside.sum()
    return sums


class HeldOutGuard(Guard):
    """Watches a held-out metric: alarm when it has fallen below its best while the training metric went on improving.

    Judges each validation as it is, without a mean, and logs nothing: the metric is logged already. The fall is our
    choice; make it larger than the noise of your validation (avg@1 on 256 problems: about 0.03).

    Args:
        held_out: Logged metric of the validation, such as ``val/avg_at_1`` or ``val/reverse_kl``.
        training: Logged metric of training; smaller is better.
        most_lost: Alarm when the held-out metric is so much worse than its best.
        higher_is_better: Whether that is so of the held-out metric.
        action: What to do.
    """

    def __init__(
        self,
        held_out: str = "val/avg_at_1",
        training: str = "train/reverse_kl",
        most_lost: float = 0.05,
        higher_is_better: bool = True,
        action: Action = "warn",
    ) -> None:
        super().__init__(action, window=1)
        check_range(self, "most_lost", most_lost, low=0.0)
        self.held_out, self.training, self.most_lost = held_out, training, most_lost
        self.best_is_highest = higher_is_better
        self.training_at_best = math.inf
        self.training_now = math.inf
        self._has_trained = False

    @override
    def measure(self, trainer: Trainer, outputs: Any) -> float | None:
        return None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._has_trained = True  # it judges once for each validation, not for each step

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held_out, training = logged(trainer, self.held_out), logged(trainer, self.training)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if training is None and self._has_trained:
            self.miss(self.training)
        if held_out is None:
            self.miss(self.held_out)
            return
        best, self.training_now = self.best, math.inf if training is None else training
        self.best = held_out if best is None else (max if self.best_is_highest else min)(best, held_out)
        if self.best != best:
            self.training_at_best = self.training_now
        self.ring(self.complaint(held_out, held_out, self.best), trainer)

    @override
    def complaint(self, now: float, first: float, best: float) -> str | None:
        lost = best - now if self.best_is_highest else now - best
        if lost > self.most_lost and self.training_now < self.training_at_best:
            return (
                f"{self.held_out} was {best:.3g} at its best and is {now:.3g}, while {self.training} went from"
                f" {self.training_at_best:.3g} to {self.training_now:.3g}."
            )
        return None

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"training_at_best": self.training_at_best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.training_at_best = state_dict["training_at_best"]
