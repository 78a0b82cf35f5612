"""Teacher scores held as one dense matrix of log-probabilities."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import TeacherScores
from opd_lightning.objectives.top_tokens import top_tokens


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
        self.response_ids = response_ids

    @override
    def slice(self, start: int, stop: int) -> DenseScores:
        return DenseScores(self._log_probs[start:stop], self.response_ids[start:stop])

    @override
    def full(self) -> Tensor:
        return self._log_probs

    @override
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        log_probs, ids = top_tokens(self._log_probs, min(k, self._log_probs.shape[-1]))
        return ids, log_probs
