"""`EntropyGate`: AntiSD's penalty stops while the teacher has lost its uncertainty (arXiv 2605.11609)."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import RolloutBatch, StepFacts
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.methods import AntiSelfDistillation
from opd_lightning.objectives import SampledTokenObjective, known_facts
from opd_lightning.training.module import OPDModule


class EntropyGate(Callback):
    """Opens and closes the gate of `AntiSelfDistillation` by the median teacher entropy H of a step's tokens.

    Closed during the first steps, whose median gives the reference H_warm. Then open where H is at least H_warm, closed
    where it is below `close_below` times H_warm, and as it was in between. A step's gate follows from the steps before
    it: the entropies of its own tokens are known only when it has been trained.

    Args:
        warm_up: Steps that only watch. H_warm is the mean of their medians; how the paper combines them is not known.
        close_below: Share of H_warm below which the gate closes.

    Raises:
        ValueError: A setting is outside its range, or there is no gate to open.

    Source: arXiv 2605.11609.
    """

    def __init__(self, warm_up: int = 5, close_below: float = 0.93) -> None:
        check_at_least(1, "EntropyGate", warm_up=warm_up)
        if not 0 < close_below <= 1:
            raise ValueError(f"EntropyGate.close_below: expected a number in (0, 1], got {close_below}.")
        self.warm_up = warm_up
        self.close_below = close_below
        self.medians: list[float] = []  # of the first steps
        self.gate = 0.0

    def move(self, median: float) -> None:
        """The gate after a step with this median entropy."""
        if len(self.medians) < self.warm_up:
            self.medians.append(median)
            if len(self.medians) < self.warm_up:
                return
        reference = sum(self.medians) / len(self.medians)
        if median >= reference:
            self.gate = 1.0
        elif median < self.close_below * reference:
            self.gate = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gated(pl_module)
        assert isinstance(pl_module, OPDModule)
        if "teacher_entropy" not in known_facts(pl_module.score_request, pl_module.facts_k):
            raise ValueError(
                "EntropyGate: it follows teacher_entropy, which this run does not know. Set model.top_k_metrics to 1 or"
                " more, with a teacher that gives its whole vocabulary."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        self._gated(pl_module).gate = self.gate

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        facts: StepFacts = outputs["facts"]
        mine = [rollout.facts["teacher_entropy"] for rollout in facts.rollouts]
        own = torch.cat(mine) if mine else torch.empty(0)
        everyone: list[Tensor] = gather_objects(own)
        entropies = torch.cat(everyone)
        if len(entropies):
            self.move(float(entropies.median()))
        pl_module.log("train/entropy_gate", self.gate, batch_size=1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"medians": list(self.medians), "gate": self.gate}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.medians, self.gate = list(state_dict["medians"]), state_dict["gate"]

    @staticmethod
    def _gated(pl_module: LightningModule) -> AntiSelfDistillation:
        objective = getattr(pl_module, "objective", None)
        if isinstance(objective, SampledTokenObjective) and isinstance(objective.advantage, AntiSelfDistillation):
            return objective.advantage
        raise ValueError(
            "EntropyGate: it opens the gate of AntiSelfDistillation, which this run does not have. Set"
            " model.objective: {class_path: SampledTokenObjective, init_args: {advantage: AntiSelfDistillation}}, or"
            " leave the callback out."
        )
