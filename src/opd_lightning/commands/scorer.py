"""`Scorer`: a teacher says what it thinks of answers while they are written to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opd_lightning.interfaces import Rollout, ScoreRequest, Student, Teacher
from opd_lightning.rollouts.answer_scores import score_answers
from opd_lightning.training.resuming import describe_settings


@dataclass
class Scorer:
    """A teacher, and what it is asked.

    Args:
        teacher: Who scores.
        request: The sampled tokens, or a list of its likeliest too.
        max_tokens: Most padded tokens that go through it at once.
    """

    teacher: Teacher
    request: ScoreRequest
    max_tokens: int

    def check(self, student: Student) -> None:
        """Ask before any weight is loaded whether it can score this student's answers.

        Raises:
            ValueError: It cannot.
        """
        self.teacher.check(self.request)
        self.teacher.preflight(student)
        self._pad_id = student.tokenizer.pad_id

    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Load the teacher."""
        self.teacher.setup(student, model, device)
        self._device = device

    def __call__(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """Columns with its scores of each rollout, in order."""
        return score_answers(
            self.teacher,
            rollouts,
            self.request,
            max_tokens=self.max_tokens,
            pad_id=self._pad_id,
            device=self._device,
        )

    def describe(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "teacher": describe_settings(self.teacher),
            "top_k": self.request.top_k,
            "temperature": self.request.temperature,
        }
