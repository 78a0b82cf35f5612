"""The seams of problems: tasks, which prompts next, and what EffOPD maximises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_lightning.interfaces.words import Problem, Rollout, Split


@dataclass(frozen=True)
class PromptOutcome:
    """What became of one prompt of a step.

    Attributes:
        index: Of the prompt among the training problems.
        rewards: Those of its rollouts.
    """

    index: int
    rewards: tuple[float, ...]


class PromptSelector(ABC):
    """Chooses which problems come next; identical on all ranks, as it draws globally and sees all outcomes.

    Attributes:
        needs_rewards: Whether it learns from rewards, so that a task without answers is refused.
    """

    needs_rewards: bool = False

    @abstractmethod
    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the training problems; called once, before `load_state_dict`."""

    @abstractmethod
    def select(self, num_problems: int) -> list[int]:
        """Indices of the next problems; a function of the seed and of the saved state only."""

    def observe(self, outcomes: Iterable[PromptOutcome]) -> None:  # noqa: B027 - most do not learn
        """Learn from the rollouts of the last selection (default: ignore them)."""

    @property
    def epoch_length(self) -> int:
        """Problems in one pass, for counting epochs."""
        raise AssertionError(f"{type(self).__name__} must define epoch_length")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Every value a future `select` reads: plain numbers, strings, lists, dicts and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""

    def metrics(self) -> dict[str, float]:
        """Numbers worth logging."""
        return {}


class Task(ABC):
    """Problems, their rendering as chat messages, and the marking of answers.

    A task that overrides neither `grade` nor `grade_rollouts` is one without answers: its rollouts have no reward.
    """

    @abstractmethod
    def problems(self, split: Split) -> list[Problem]:
        """All problems of a split, in a fixed order."""

    def grade(self, problem: Problem, response: str) -> float:
        """Mark a response: 1 is right, 0 is wrong, in between for partial credit."""
        raise AssertionError(f"{type(self).__name__} has no answers to mark; ask `is_graded` first")

    def grade_rollouts(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Mark rollouts; override it to see token ids and `finished`, or to mark side by side."""
        return [self.grade(rollout.problem, rollout.text) for rollout in rollouts]

    def can_grade(self, problem: Problem) -> bool:
        """Whether answers to this problem can be marked (default: all or none); others have no reward."""
        return self.is_graded

    def reworded(self, wording: Mapping[str, Any]) -> Task:
        """The same task, its questions put as these arguments of its constructor would put them.

        Raises:
            ValueError: It does not take one of them.
        """
        for name in wording:
            raise ValueError(
                f"data.task: {type(self).__name__} has no setting {name!r} to put its questions otherwise."
            )
        return self

    @property
    def is_graded(self) -> bool:
        """Whether there is anything to mark: `grade` or `grade_rollouts` is overridden."""
        cls = type(self)
        return cls.grade is not Task.grade or cls.grade_rollouts is not Task.grade_rollouts


class Score(ABC):
    """What EffOPD maximises."""

    @abstractmethod
    def __call__(self, trainer: Any, module: Any) -> float:
        """Return the score of the current weights, higher is better, the same on all ranks."""

    def begin(self, trainer: Any, module: Any) -> None:  # noqa: B027 - most score every point from scratch
        """A search begins: called once on all ranks, before its first score."""

    def check(self, trainer: Any, module: Any) -> None:  # noqa: B027 - not every score has something to check
        """Refuse a run in which the score could not be taken; called on all ranks before anything is trained.

        Raises:
            ValueError: It could not; the message says what is missing.
        """
