"""One line before a fit begins: what a step will take of the device's memory."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from opd_lightning.backends.hf import HFStudent
from opd_lightning.callbacks.rescue import trainer_callbacks
from opd_lightning.commands.plan import layout_of
from opd_lightning.commands.plan_report import one_line
from opd_lightning.commands.planned_case import Surroundings, case_of
from opd_lightning.planning import NotPlannedError, budget, memory_of, rehearse
from opd_lightning.training.module import OPDModule

_LEAST_BYTES = 2**26  # of a student's files


class PlanLine(Callback):
    """Prints the peak that is planned for a step, and warns where it is more than the device has.

    It comes after the prompts were read and before any weight is loaded. Students that are no `HFStudent` are not
    planned, nor are those whose files are so small that the seconds it takes would be lost.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or not isinstance(pl_module, OPDModule):
            return
        device = trainer.strategy.root_device
        memory_gb = memory_of(device)
        if memory_gb is None or not isinstance(pl_module.spec, HFStudent) or _is_small(pl_module.spec):
            return
        data = pl_module.data
        layout = layout_of(
            trainer.world_size, type(trainer.strategy).__name__, data, memory_gb, is_gpu=device.type == "cuda"
        )
        surroundings = Surroundings(str(trainer.precision), trainer.world_size, trainer_callbacks(trainer))
        try:
            case = case_of(pl_module, data, surroundings, data.longest_prompt)
            planned = budget(case, rehearse(case), layout, memory_gb)
        except NotPlannedError as error:
            print(error, file=sys.stderr)
            return
        print(f"plan: {one_line(case, planned)}", file=sys.stderr)
        if not planned.fits:
            rank_zero_warn(
                f"plan: a step is likely to need more memory than {device} has, {planned.peak_gb:.2f} of"
                f" {memory_gb:.2f} GB. `opd-lightning plan` with the same settings says what would make it fit."
            )


def _is_small(student: HFStudent) -> bool:
    """Whether the student's files are here and small."""
    source = student.source
    files = Path(source.location).glob("*.safetensors") if source.is_folder else ()
    return source.is_folder and sum(path.stat().st_size for path in files) < _LEAST_BYTES
