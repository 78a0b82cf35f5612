"""`MovingAverageTeacher`: the student as it was, on average."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, ScoreRequest, Student, Teacher
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.objectives import HiddenScores


class MovingAverageTeacher(Teacher):
    """The student itself, with an exponential moving average of its weights: w <- (1 - rate) w + rate student.

    The average begins at the student that training begins with, and moves once after every optimiser step that was
    not skipped; what a search (EffOPD) does to the weights reaches it with the next step. It is held in float32, for
    trained weights only, and is part of every checkpoint: unlike a teacher from a folder it could not be had again.
    To score, the student's module is run with these weights in place of its own.

    At rate 0 this is the student at the start: `BaseModelTeacher` (under LoRA), or an `HFTeacher` with the student's
    path, are the same and need no room in checkpoints. At rate 1 it is the student as it is, and nothing is held.

    Args:
        rate: Share of the student in each step of the average.

    Raises:
        ValueError: The rate is outside [0, 1].
    """

    def __init__(self, rate: float = 0.05) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(
                f"model.teacher.rate: expected a number from 0 (the student at the start) to 1 (as it is), got {rate}."
            )
        self.rate = rate
        self._student: Student | None = None
        self._model: nn.Module | None = None
        self._device = torch.device("cpu")
        self._average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None

    @property
    @override
    def changes(self) -> bool:  # type: ignore[override]
        return self.rate > 0

    @property
    @override
    def offer(self) -> ScoreRequest:
        return ScoreRequest(top_k=sys.maxsize, arbitrary_ids=True, full_vocabulary=True)

    @property
    @override
    def context_length(self) -> int | None:
        return None if self._student is None else self._student.context_length

    @override
    def preflight(self, student: Student) -> None:
        """Nothing can differ: it is the student."""
        self._student = student

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Begin the average, or take up that of a checkpoint."""
        self._student, self._model, self._device = student, model, device
        if self.rate == 1:
            return
        start = {name: weight.detach().float() for name, weight in self._trained()}
        if self._loaded is not None:
            if {name: weight.shape for name, weight in start.items()} != {
                name: weight.shape for name, weight in self._loaded.items()
            }:
                raise ValueError(
                    "model.teacher: the average in the checkpoint is of other weights than the student trains now. Use"
                    " the student it was written with."
                )
            start, self._loaded = self._loaded, None
        self._average = {name: weight.to(device, torch.float32, copy=True) for name, weight in start.items()}

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> HiddenScores:
        assert self._student is not None and self._model is not None, "call setup before score"
        batch = batch.to(self._device)
        with torch.no_grad(), evaluation_mode(self._model), self._in_place():
            hidden = self._student.hidden_states(self._model, batch)
            head = self._student.head(self._model)
            bias = None if head.bias is None else head.bias.detach()
            head = replace(head, weight=head.weight.detach(), bias=bias)  # these stay the average's
        return HiddenScores(hidden, batch.tokens.ids, head, request.temperature, in_autocast=True)

    @override
    def follow(self) -> None:
        with torch.no_grad():
            for name, weight in self._trained() if self._average and self.rate else ():
                self._average[name].lerp_(weight.detach().float(), self.rate)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self._average)} if self._average else {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.rate == 1:
            return
        if "average" not in state:
            raise ValueError(
                "model.teacher: MovingAverageTeacher goes on with the average in the checkpoint, which holds none."
                " Resume with the teacher it was written with, or start a new run (opd-lightning export, then"
                " student.path)."
            )
        self._loaded = dict(state["average"])

    @override
    def close(self) -> None:
        """Let go of the student; the average stays, for a checkpoint that is written afterwards."""
        self._model = None

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self._model is not None
        return ((name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The student's module, with the average for its weights."""
        own = [(weight, weight.data) for _, weight in self._trained()]
        kind = self._device.type
        # autocast keeps casts by tensor: neither the student's may be used here, nor these, without gradient, by it
        without_cache = torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        try:
            for name, weight in self._trained() if self._average else ():
                weight.data = self._average[name].to(weight.dtype)
            with without_cache:
                yield
        finally:
            for weight, data in own:
                weight.data = data
