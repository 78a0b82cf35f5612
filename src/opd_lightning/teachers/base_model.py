"""`BaseModelTeacher`: the student without its adapter."""

from __future__ import annotations

import sys

import torch
from torch import nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, ScoreRequest, Student, Teacher
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.objectives import HiddenScores


class BaseModelTeacher(Teacher):
    """The base of a student with an adapter as its teacher: the same module with the adapter off, loaded once.

    It runs in the surrounding autocast context like the student, so that both agree exactly while the adapter is still
    zero. Useful to pull a student back to where it came from, alone or (as one of several) as an anchor.
    """

    def __init__(self) -> None:
        self._student: Student | None = None
        self._model: nn.Module | None = None
        self._device = torch.device("cpu")

    @property
    @override
    def offer(self) -> ScoreRequest:
        return ScoreRequest(top_k=sys.maxsize, arbitrary_ids=True, full_vocabulary=True)

    @override
    def preflight(self, student: Student) -> None:
        if not student.has_adapter:
            raise ValueError(
                "teacher: BaseModelTeacher is the student without its adapter, but the student has none. Set"
                " student.lora, or choose HFTeacher."
            )

    @override
    def page(self) -> None:
        """Nothing to do: its weights are the student's, which stay."""

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Remember the student's module; nothing is loaded."""
        self.preflight(student)
        self._student, self._model, self._device = student, model, device

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> HiddenScores:
        assert self._student is not None and self._model is not None, "call setup before score"
        batch = batch.to(self._device)
        base = self._student.as_base(self._model)
        assert base is not None
        with torch.no_grad(), evaluation_mode(self._model), base:
            hidden = self._student.hidden_states(self._model, batch)
            head = self._student.head(self._model)
        return HiddenScores(hidden, batch.tokens.ids, head, request.temperature, in_autocast=True)

    @override
    def close(self) -> None:
        self._model = None
