"""What a loss asks of the student: its log-probabilities, with gradient, as a teacher is asked for its own.

A loss that asks in this way, and not for logits, leaves open how the gradient reaches the logits: by autograd
(`StudentLogits`), or by formula where they lie in a buffer that is used again (`block_scores.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Objective, ResponseTokens, TeacherScores
from opd_lightning.objectives.logprobs import full_log_probs, log_probs_at, temper
from opd_lightning.objectives.normalization import log_mass_outside


class StudentScores(ABC):
    """Tempered log-probabilities of n response tokens, in nats."""

    @abstractmethod
    def at(self, token_ids: Tensor) -> Tensor:
        """[n, K] at the given ids [n, K], with gradient."""

    @abstractmethod
    def full(self) -> Tensor:
        """[n, V] of the whole vocabulary, with gradient."""

    @abstractmethod
    def log_mass_outside(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        """[n] logarithm of the mass of all tokens but these (`normalization.log_mass_outside`), with gradient."""

    @abstractmethod
    def tempered(self) -> Tensor:
        """[n, V] tempered logits, without gradient; not to be changed."""


class StudentLogits(StudentScores):
    """Answers from logits, differentiated by autograd.

    Args:
        logits: [n, V] untempered, with gradient; half precision is upcast to float32.
        temperature: Divides them.
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        self._logits = logits
        self._temperature = temperature
        self._log_probs: Tensor | None = None

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        if self._log_probs is not None:
            return self._log_probs.gather(-1, token_ids)
        return log_probs_at(self._logits, token_ids, self._temperature)

    @override
    def full(self) -> Tensor:
        if self._log_probs is None:
            self._log_probs = full_log_probs(self._logits, self._temperature)
        return self._log_probs

    @override
    def log_mass_outside(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        return log_mass_outside(self.full(), token_ids, mask)

    @override
    def tempered(self) -> Tensor:
        return temper(self._logits.detach(), self._temperature)


class ScoreObjective(Objective):
    """An objective whose losses are a function of some of the student's log-probabilities.

    Its gradient reaches the logits by formula, without an autograd graph over the vocabulary (`gradients.py`).
    """

    @abstractmethod
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        """Losses [n] of n response tokens, in nats, differentiable in what `student` answers.

        Args:
            student: Log-probabilities of the same n tokens, at `student_temperature`.
            teacher: Scores of the same n tokens as `request` asked for; None when it asked for nothing.
            tokens: The n tokens.
        """

    @override
    def token_losses(self, student_logits: Tensor, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert student_logits.shape[0] == len(tokens) and (teacher is None or teacher.num_tokens == len(tokens))
        return self.losses_from(StudentLogits(student_logits, self.student_temperature), teacher, tokens)
