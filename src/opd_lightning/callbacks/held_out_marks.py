"""`HeldOutMarks`: what single held-out problems were marked at each validation, to compare runs by problem."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import Rollout
from opd_lightning.reports.training_runs.folder import MARKS
from opd_lightning.training.metrics_file import append_whole
from opd_lightning.training.output_paths import run_folder


class HeldOutMarks(Callback):
    """Appends a line to `held_out_marks.jsonl` in the run's folder after each validation of a fit.

    A line holds ``{"step": ..., "marks": {uid: [mark of each answer]}}``: about 30 bytes for each problem with one
    answer. `opd-lightning report` reads it. Answers of tasks that mark nothing are left out. When the file cannot be
    written the run goes on, with a warning.

    Needs a validation step that returns ``{"rollouts": ...}``, the answers, as those of this package do.
    """

    def __init__(self) -> None:
        self._marks: dict[str, list[float]] = {}
        self._has_begun = False

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks = {}

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batch_marks: dict[str, list[float]] = {}
        answers: Sequence[Rollout] = outputs.get("rollouts", ()) if isinstance(outputs, Mapping) else ()
        for rollout in answers:
            if not math.isnan(rollout.reward):
                batch_marks.setdefault(rollout.problem.uid, []).append(rollout.reward)
        self._marks |= batch_marks

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        marks = {uid: each for part in gather_objects(self._marks) for uid, each in part.items()}
        if not trainer.is_global_zero or not marks or "://" in str(folder := run_folder(trainer)):
            return
        line = json.dumps({"step": trainer.global_step, "marks": marks}, separators=(",", ":")) + "\n"
        path = folder / MARKS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self._has_begun and trainer.ckpt_path is None:
                path.unlink(missing_ok=True)  # of another run in the same folder
            append_whole(path, line.encode())
            self._has_begun = True
        except OSError as error:
            rank_zero_warn(f"HeldOutMarks: {str(path)!r} could not be written ({error.strerror}); the run goes on.")
