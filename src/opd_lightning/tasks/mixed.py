"""`MixedTask`: the training questions of several tasks, each marked by its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import override

from opd_lightning.interfaces import Problem, Rollout, Split, Task


@dataclass(frozen=True)
class MixedProblem(Problem):
    """A training problem of one of the tasks.

    Attributes:
        inner: As its own task gave it.
    """

    inner: Problem = field(kw_only=True)


class MixedTask(Task):
    """A task with the training questions of other tasks among its own, say prompts of another kind without answers.

    Held-out splits are those of the inner task, so accuracies stay what they were. A training problem has its task's
    name as its source and in front of its uid; in which shares they are drawn is for the selector to say: `Mixture`,
    whose weights go by these names (without one each has the share of its size). Where the inner task marks nothing,
    nothing is marked; problems of other tasks without answers have no reward beside those of the inner task that have.

    Args:
        inner: The task that the run is about.
        others: Tasks by name whose training questions are mixed in.
        name: Of the inner task, in the selector's weights and in metrics.

    Raises:
        ValueError: There are no others, or names clash; from `problems`, one of them has no training questions.
    """

    def __init__(self, inner: Task, others: dict[str, Task], name: str = "main") -> None:
        if not others:
            raise ValueError("task.others: expected tasks by name to mix in, got none. Name one, or use `inner` alone.")
        for setting, each in (("name", name), *(("others", other) for other in others)):
            if not each or "/" in each:
                raise ValueError(f"task.{setting}: expected names without slashes, got {each!r}.")
        if name in others:
            raise ValueError(f"task.name: {name!r} is also the name of another task. Choose another.")
        self.inner, self.others, self.name = inner, others, name
        self._parts = {name: inner, **others}

    @override
    def problems(self, split: Split) -> list[Problem]:
        """The problems of the inner task; of the training split those of all tasks, the inner task's first.

        Raises:
            ValueError: One of them has no training questions.
        """
        if split != "train":
            return self.inner.problems(split)
        mixed: list[Problem] = []
        for name, task in self._parts.items():
            problems = task.problems("train")
            if not problems:
                if task is self.inner:
                    raise ValueError("task.inner: it has no training questions. Give it some, or use the others alone.")
                raise ValueError(f"task.others: {name!r} has no training questions. Give it some, or leave it out.")
            mixed += [
                MixedProblem(f"{name}/{each.uid}", each.messages, each.answer, name, each.columns, inner=each)
                for each in problems
            ]
        return mixed

    @override
    def grade_rollouts(self, rollouts: Sequence[Rollout]) -> list[float]:
        """As the task of each marks it."""
        grades: dict[int, float] = {}
        for name, task in self._parts.items():
            places = [i for i, rollout in enumerate(rollouts) if self._name_of(rollout.problem) == name]
            if places:
                own = [replace(rollouts[i], problem=_inner(rollouts[i].problem)) for i in places]
                grades |= dict(zip(places, task.grade_rollouts(own), strict=True))
        return [grades[i] for i in range(len(rollouts))]

    @property
    @override
    def is_graded(self) -> bool:
        """Whether the inner task marks."""
        return self.inner.is_graded

    @override
    def can_grade(self, problem: Problem) -> bool:
        """Whether its own task can mark it, and the inner one marks at all."""
        return self.is_graded and self._parts[self._name_of(problem)].can_grade(_inner(problem))

    @override
    def reworded(self, wording: Mapping[str, Any]) -> Task:
        """The same mixture with the inner task in other words."""
        return MixedTask(self.inner.reworded(wording), self.others, self.name)

    def _name_of(self, problem: Problem) -> str:
        return problem.source if isinstance(problem, MixedProblem) else self.name


def _inner(problem: Problem) -> Problem:
    return problem.inner if isinstance(problem, MixedProblem) else problem
