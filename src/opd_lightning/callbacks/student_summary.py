"""`StudentSummary`: one line about what is trained, in place of Lightning's table of sub-modules."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class StudentSummary(ModelSummary):
    """Prints class, parameters, trained parameters and bytes of the student, once, when its weights are there.

    The teacher is no part of the module, and FLOPs are not known from layers alone, so neither is shown. Takes the
    arguments of Lightning's `ModelSummary`, of which `max_depth` changes nothing here.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        student: Any = pl_module.student
        parameters = list(student.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        name = type(student).__name__.removeprefix("FSDP")  # which FSDP2 puts in front
        rank_zero_info(
            f"Student: {name}, {_short(sum(p.numel() for p in parameters))} parameters"
            f" ({_short(trained)} trained), {_short(size)}B"
        )


def _short(count: int) -> str:
    for unit, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {prefix}"
    return f"{count} "
