"""`SourceMetrics`: what training looks like on each source of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from opd_lightning.interfaces import TrainedRollout
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.metrics import Means, SumAndCount, rollout_statistics

FACTS = ("reverse_kl", "sampled_log_ratio", "overlap_ratio", "student_entropy", "teacher_entropy")


class SourceMetrics(Callback):
    """Logs ``train/<source>/...`` for each source of the training problems, in the steps in which it occurs.

    Accuracy, response length, truncation and repetition rate; reverse KL, overlap and entropies as far as they are
    known; and `share`, the source's share of the step's rollouts. Needs an `OPDModule`; nothing is logged where all
    problems have one source.
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, OPDDataModule) or data.stream is None or not isinstance(outputs, Mapping):
            return
        sources = sorted({problem.source for problem in data.stream.problems})
        if len(sources) == 1:
            return
        means = Means().to(pl_module.device)
        trained = outputs["facts"].rollouts
        for source in sources:  # of all of them in this order, as every process has to
            own = [each for each in trained if each.rollout.problem.source == source]
            pairs = {"share": (len(own), len(trained))} | rollout_statistics([each.rollout for each in own])
            pairs |= {name: _sum_and_count(own, name) for name in FACTS}
            means.update({f"train/{source}/{name}": pair for name, pair in pairs.items()})
        for name, value in means.compute().items():
            pl_module.log(name, value, batch_size=1)


def _sum_and_count(trained: list[TrainedRollout], name: str) -> SumAndCount:
    known = [each.facts[name].double() for each in trained if name in each.facts]
    total = sum(float(values.nansum()) for values in known)
    return total, sum(int((~values.isnan()).sum()) for values in known)
