"""ROPD: a teacher that gives text only marks the answers of a group by criteria (arXiv 2605.07396)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, Rollout, Sampling, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import Importance, ScoreObjective, StudentScores, Truncated
from opd_lightning.objectives.arguments import check_factor, check_temperatures, check_whole_distribution
from opd_lightning.objectives.logprobs import close_slots
from opd_lightning.objectives.marks import GROUP_ADVANTAGE, with_group_advantages
from opd_lightning.objectives.sampled_token import push

_TINY = 1e-8


class Judge(ABC):
    """Marks answers, those to one prompt side by side."""

    @abstractmethod
    def scores(self, groups: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        """A number in [0, 1] for each rollout of each group, the same whenever it is asked again.

        Raises:
            ValueError: Whoever marks gave something else.
        """


class RubricObjective(ScoreObjective):
    """Score-function losses -A log p(y), where A is a rollout's mark less the mean of its group.

    All tokens of a rollout have the same advantage; groups are not divided by their deviation. The losses need no
    teacher that scores tokens. Values are surrogates: only their gradient means something.

    Args:
        judge: Gives the marks, once for each step.
        importance: Correction for tokens drawn with older weights or by another engine; null for none.
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution at
            `student_temperature`.
        chunk_tokens: Response tokens whose logits exist at once.

    Raises:
        ValueError: A number is outside its range.

    Source: arXiv 2605.07396 and the authors' code.
    """

    compares_answers = True

    def __init__(
        self,
        judge: Judge,
        importance: Importance | None = Truncated(),  # noqa: B008 - frozen
        student_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
    ) -> None:
        check_factor("judge", judge, Judge)
        if importance is not None:
            check_factor("importance", importance, Importance)
        check_temperatures(student_temperature=student_temperature)
        check_at_least(1, "objective", chunk_tokens=chunk_tokens)
        self.judge = judge
        self.importance = importance
        self.student_temperature = student_temperature
        self.allow_biased_sampling = allow_biased_sampling
        self.chunk_tokens = chunk_tokens
        self.needs_rollout_log_probs = importance is not None and importance.reads_rollout_log_probs

    @override
    def request(self) -> None:
        return None

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        check_whole_distribution(sampling, self.student_temperature, self.allow_biased_sampling)

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
        if any(len(group) < 2 for group in groups):
            raise ValueError(
                "model.objective: RubricObjective compares answers to one prompt with each other, and one alone has"
                " the advantage 0. Set data.rollouts_per_prompt to 2 or more (the paper takes 8)."
            )
        marks = self.judge.scores(groups)
        return [
            with_group_advantages(group, _checked(marked), scaled=False)
            for group, marked in zip(groups, marks, strict=True)
        ]

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        log_probs = close_slots(student.at(tokens.ids[:, None]).squeeze(-1))
        return push(tokens.extras[GROUP_ADVANTAGE].to(log_probs), log_probs, tokens, self.importance)


def rubric_score(weights: Sequence[float], marks: Sequence[int]) -> float:
    """The weight of the criteria that are met over that of all: sum of w v / (sum of w + 1e-8), in [0, 1].

    Args:
        weights: At least 0.
        marks: 0 or 1 for each criterion.
    """
    met = math.fsum(weight for weight, mark in zip(weights, marks, strict=True) if mark)
    return met / (math.fsum(weights) + _TINY)


def _checked(marks: Sequence[float]) -> Tensor:
    if outside := [mark for mark in marks if not 0 <= mark <= 1]:
        raise ValueError(f"objective.judge: expected marks from 0 to 1, got {outside[0]}.")
    return torch.tensor(marks, dtype=torch.float64)
