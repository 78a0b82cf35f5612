"""What combinations of several teachers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Problem, Rollout, ScoreRequest, Student, Teacher, TeacherScores


class SeveralTeachers(Teacher):
    """Teachers by name. What one of them refuses is refused, and the message says which.

    With `paged`, the body of each (all but its head) rests in CPU memory and visits the device once per step, one
    after the other in the order in which they are given, so that the device holds the largest of them and not all.
    Their heads stay there: scores are kept as hidden states, and turned into log-probabilities when they are read.
    No score depends on it, nor on the order.

    Args:
        teachers: By name.
        paged: Whether they take turns on the device.

    Attributes:
        place: Between `model.teacher.` and a teacher's name in the setting that gives it.

    Raises:
        ValueError: There is none.
    """

    place = "teachers."

    def __init__(self, teachers: dict[str, Teacher], paged: bool = False) -> None:
        if not teachers:
            raise ValueError("model.teacher.teachers: expected at least one teacher by name, got none.")
        self.teachers = teachers
        self.paged = paged

    @property
    @override
    def changes(self) -> bool:  # type: ignore[override]
        return any(teacher.changes for teacher in self.teachers.values())

    @property
    @override
    def offer(self) -> ScoreRequest:
        """What all of them give."""
        offers = [teacher.offer for teacher in self.teachers.values()]
        return ScoreRequest(
            top_k=min(offer.top_k for offer in offers),
            arbitrary_ids=all(offer.arbitrary_ids for offer in offers),
            full_vocabulary=all(offer.full_vocabulary for offer in offers),
        )

    @property
    @override
    def context_length(self) -> int | None:
        """That of the one that reads least."""
        lengths = [teacher.context_length for teacher in self.teachers.values()]
        return min((length for length in lengths if length is not None), default=None)

    @override
    def check(self, request: ScoreRequest) -> None:
        super().check(request)
        for name, teacher in self.teachers.items():
            with self._named(name):
                teacher.check(request)

    @override
    def preflight(self, student: Student) -> None:
        """Check each of them against the student, and whether they can take turns."""
        for name, teacher in self.teachers.items():
            with self._named(name):
                if self.paged:
                    teacher.page()
                teacher.preflight(student)

    @override
    def check_problems(self, problems: Sequence[Problem]) -> None:
        for name, teacher in self.teachers.items():
            with self._named(name):
                teacher.check_problems(problems)

    @override
    def page(self) -> None:
        self.paged = True

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        for name, teacher in self.teachers.items():
            with self._named(name):
                if self.paged:
                    teacher.page()
                teacher.setup(student, model, device)

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        for teacher in self.teachers.values():
            groups = teacher.shape(groups)
        return groups

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        return next(iter(self.score_all([batch], request)))

    @override
    @abstractmethod
    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        """Score the micro-batches of one step in order."""

    @override
    def prefetch(self, rollout: Rollout, request: ScoreRequest, step: int) -> None:
        for teacher in self.asked(rollout):
            teacher.prefetch(rollout, request, step)

    def asked(self, rollout: Rollout) -> Iterator[Teacher]:
        """Who scores a rollout."""
        yield from self.teachers.values()

    @override
    def follow(self) -> None:
        for teacher in self.teachers.values():
            teacher.follow()

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {name: teacher.state_dict() for name, teacher in self.teachers.items()}
        return {name: state for name, state in states.items() if state}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, teacher in self.teachers.items():
            with self._named(name):
                teacher.load_state_dict(state.get(name, {}))

    @override
    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Say of an error which teacher it is about."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"model.teacher.{self.place}{name}: {error}") from error
