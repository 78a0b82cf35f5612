"""What a teacher says of response tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_lightning.interfaces.tokens import LinearHead


class TeacherScores(ABC):
    """Tempered teacher log-probabilities (float32, nats) for N response tokens, whatever backend they came from.

    `full` is enough where it is at hand; a backend that cannot give it overrides `sampled`, `at` and `topk`.

    Attributes:
        response_ids: int64 [N], the sampled tokens.
        knows_full: Whether `full` may be called whatever was asked for.
        joined: bool [N], whether a token is one unit with the token before it, so that a chunk must not end between
            the two; None where every token stands alone.
    """

    response_ids: Tensor
    knows_full: bool = True
    joined: Tensor | None = None

    @abstractmethod
    def slice(self, start: int, stop: int) -> TeacherScores:
        """Scores of the response tokens start..stop-1."""

    @abstractmethod
    def full(self) -> Tensor:
        """[N, V] log-probabilities of the whole vocabulary. Call it on slices."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.response_ids.numel()

    def sampled(self) -> Tensor:
        """[N] log-probabilities of the sampled tokens."""
        return self.at(self.response_ids[:, None]).squeeze(-1)

    def at(self, token_ids: Tensor) -> Tensor:
        """[N, K] log-probabilities at the given ids [N, K]."""
        return self.full().gather(-1, token_ids)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids [N, k] and their log-probabilities [N, k], likeliest first; k is clipped to V."""
        full = self.full()
        log_probs, ids = full.topk(min(k, full.shape[-1]), dim=-1)
        return ids, log_probs

    def members(self) -> Sequence[tuple[Tensor, TeacherScores]]:
        """Weights [N] and scores of the teachers that these are a mixture of; themselves, where they are none."""
        return [(torch.ones_like(self.response_ids, dtype=torch.float32), self)]

    def columns(self) -> dict[str, Tensor] | None:
        """All that these scores consist of, by name, [N, ...] each: one row for each token. None where it is more."""
        return None

    def from_columns(self, columns: Mapping[str, Tensor]) -> TeacherScores:
        """Scores of the same kind of other tokens, from such columns."""
        raise AssertionError("defined wherever `columns` is")

    def write_logits(self, out: Tensor) -> bool:
        """Write tempered logits, or log-probabilities up to a constant per row, to `out` [N, V], where that is cheaper.

        Returns:
            Whether it was done. False leaves `out` as it is, and `full` is asked.
        """
        return False

    def hidden(self) -> tuple[Tensor, LinearHead] | None:
        """Final hidden states [N, H] and the head that turns them into logits, where this process has both."""
        return None
