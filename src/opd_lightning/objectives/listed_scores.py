"""Teacher scores as lists: the sampled token and the likeliest k of each position."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import TeacherScores


class ListedScores(TeacherScores):
    """Log-probabilities of the sampled tokens, and the teacher's likeliest tokens with theirs.

    Args:
        response_ids: int64 [N], the sampled tokens.
        sampled: float32 [N], their log-probabilities in nats.
        ids: int64 [N, K], likeliest first.
        log_probs: float32 [N, K], nats.
    """

    knows_full = False

    def __init__(self, response_ids: Tensor, sampled: Tensor, ids: Tensor, log_probs: Tensor) -> None:
        assert sampled.dim() == 1 and ids.shape == log_probs.shape and len(ids) == len(sampled) == len(response_ids)
        self.response_ids, self._sampled, self._ids, self._log_probs = response_ids, sampled, ids, log_probs

    @override
    def slice(self, start: int, stop: int) -> ListedScores:
        """Scores of the response tokens start..stop-1."""
        columns = (self.response_ids, self._sampled, self._ids, self._log_probs)
        return ListedScores(*(column[start:stop] for column in columns))

    @override
    def columns(self) -> dict[str, Tensor]:
        """The four lists."""
        return {
            "response_ids": self.response_ids,
            "sampled": self._sampled,
            "ids": self._ids,
            "log_probs": self._log_probs,
        }

    @override
    def from_columns(self, columns: Mapping[str, Tensor]) -> ListedScores:
        """From such lists."""
        return ListedScores(**columns)

    @override
    def sampled(self) -> Tensor:
        """[N] log-probabilities of the sampled tokens."""
        return self._sampled

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        """Not offered: only the sampled tokens and the teacher's own favourites are known."""
        raise AssertionError("a teacher was asked for ids that it did not offer")

    @override
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids [N, k] and their log-probabilities [N, k], likeliest first."""
        assert k <= self._ids.shape[1], f"asked for {k} of {self._ids.shape[1]}"
        return self._ids[:, :k], self._log_probs[:, :k]

    @override
    def full(self) -> Tensor:
        """Not offered."""
        raise AssertionError("a teacher was asked for the full vocabulary, which it did not offer")
