"""`TaskAround`: a task that is another one but for its training questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from opd_lightning.interfaces import Problem, Rollout, Task


class TaskAround(Task):
    """Marks as the inner task does; `problems` is for the subclass to say.

    Args:
        inner: The task.
    """

    def __init__(self, inner: Task) -> None:
        self.inner = inner

    @override
    def grade(self, problem: Problem, response: str) -> float:
        """As the inner task marks it."""
        return self.inner.grade(problem, response)

    @override
    def grade_rollouts(self, rollouts: Sequence[Rollout]) -> list[float]:
        """As the inner task marks them."""
        return self.inner.grade_rollouts(rollouts)

    @property
    @override
    def is_graded(self) -> bool:
        """Whether the inner task marks."""
        return self.inner.is_graded

    @override
    def can_grade(self, problem: Problem) -> bool:
        """Whether the inner task can mark it."""
        return self.inner.can_grade(problem)

    @override
    def reworded(self, wording: Mapping[str, Any]) -> Task:
        """The inner task in other words, with all of its training questions: what chose among them saw these words."""
        return self.inner.reworded(wording)
