"""`AnswersWriter`: what `predict` answered, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.interfaces import Rollout
from opd_lightning.rollouts.records import answer_record
from opd_lightning.training.output_paths import check_file


class AnswersWriter(Callback):
    """Writes the answers of `predict` as JSONL, batch by batch, so that a crash loses at most the batch under way.

    Several processes write one file each (`answers.rank1.jsonl`, ...), joined when all are done.

    Args:
        path: The file; None is `answers.jsonl` in the run's log folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict" and self.path is not None:  # now, and not when the answers are there
            check_file("AnswersWriter.path", self.path)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = Path(self.path) if self.path else Path(trainer.log_dir or trainer.default_root_dir) / "answers.jsonl"
        self.target = Path(trainer.strategy.broadcast(str(target)))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("")

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[Rollout],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        lines = [json.dumps(answer_record(rollout), ensure_ascii=False) for rollout in outputs]
        # half a character of a surrogate pair cannot be UTF-8; backslashed it is what JSON writes for it
        with self._part(trainer.global_rank).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        text = "".join(part.read_text(encoding="utf-8") for part in parts)
        self.target.write_text(text, encoding="utf-8")
        for part in parts:
            part.unlink()
        say(trainer, f"Wrote {text.count(chr(10))} answers to {self.target}")

    def _part(self, rank: int) -> Path:
        return self.target.with_suffix(f".rank{rank}.jsonl")
