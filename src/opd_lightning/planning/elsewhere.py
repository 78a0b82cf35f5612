"""A teacher that runs somewhere else, for a rehearsal: its scores have a size, and nothing else of it is here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, ScoreRequest, Student, Teacher, TeacherScores


class TeacherElsewhere(Teacher):
    """In the place of a teacher whose model is not in this process.

    Args:
        offer: What that one gives.
        vocab_size: Tokens that both models share.
        uncounted: Name of one whose models are in this process after all, but in no way that can be rehearsed.
    """

    def __init__(self, offer: ScoreRequest, vocab_size: int, uncounted: str | None = None) -> None:
        self._offer, self._vocab_size, self.uncounted = offer, vocab_size, uncounted

    @property
    @override
    def offer(self) -> ScoreRequest:
        return self._offer

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Nothing is loaded."""

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        return _ScoresOfSize(batch.tokens.ids, self._vocab_size)


class _ScoresOfSize(TeacherScores):
    def __init__(self, response_ids: Tensor, vocab_size: int) -> None:
        self.response_ids, self._vocab_size = response_ids, vocab_size

    @override
    def slice(self, start: int, stop: int) -> TeacherScores:
        return _ScoresOfSize(self.response_ids[start:stop], self._vocab_size)

    @override
    def full(self) -> Tensor:
        return torch.zeros(self.num_tokens, self._vocab_size)

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        return torch.zeros(token_ids.shape)

    @override
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        shape = self.num_tokens, min(k, self._vocab_size)
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
