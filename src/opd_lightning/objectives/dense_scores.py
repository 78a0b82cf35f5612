"""Teacher scores held as one dense matrix of log-probabilities."""

from __future__ import annotations

from torch import Tensor

from opd_lightning.interfaces import TeacherScores


class DenseScores(TeacherScores):
    """Answers every question about the teacher from its full log-probabilities.

    The matrix is kept as it is, so this is for small vocabularies, for tests, and for one chunk at a time: a chunk's
    scores are computed once and then serve the objective and the statistics.

    Args:
        log_probs: [N, V] tempered, normalised log-probabilities in nats; detached here.
        response_ids: int64 [N], the sampled tokens.
    """

    def __init__(self, log_probs: Tensor, response_ids: Tensor) -> None:
        assert log_probs.dim() == 2, f"expected log_probs [N, V], got {tuple(log_probs.shape)}"
        assert response_ids.shape == log_probs.shape[:1], (
            f"expected one response id per row of {tuple(log_probs.shape)}, got {tuple(response_ids.shape)}"
        )
        self._log_probs = log_probs.detach()
        self._response_ids = response_ids

    @property
    def num_tokens(self) -> int:
        """N."""
        return self._log_probs.shape[0]

    def slice(self, start: int, stop: int) -> DenseScores:
        """Scores of the response tokens start..stop-1."""
        return DenseScores(self._log_probs[start:stop], self._response_ids[start:stop])

    def sampled(self) -> Tensor:
        """[N] log-probabilities of the sampled tokens."""
        return self.at(self._response_ids[:, None]).squeeze(-1)

    def at(self, token_ids: Tensor) -> Tensor:
        """[N, K] log-probabilities at the given ids [N, K]."""
        return self._log_probs.gather(-1, token_ids)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids [N, k] and their log-probabilities [N, k]; k is clipped to V."""
        log_probs, ids = self._log_probs.topk(min(k, self._log_probs.shape[-1]), dim=-1)
        return ids, log_probs

    def full(self) -> Tensor:
        """[N, V] log-probabilities of the whole vocabulary."""
        return self._log_probs
