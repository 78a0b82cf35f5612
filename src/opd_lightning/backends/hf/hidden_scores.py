"""Teacher scores kept as hidden states, turned into log-probabilities only for what is asked."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opd_lightning.interfaces import TeacherScores

_ENTRIES_AT_ONCE = 2**27  # float32 log-probabilities held at a time: 512 MiB


class HiddenScores(TeacherScores):
    """Final hidden states [N, H] of the teacher, and its head.

    Hidden states are some hundred times smaller than log-probabilities of a large vocabulary, so a whole step's can be
    kept. A slice computes its log-probabilities once, whatever is asked of it and how often; a large object answers in
    parts, so that no more than 512 MiB of them exist.

    Args:
        hidden: [N, H].
        response_ids: int64 [N], the sampled tokens.
        head: Turns hidden states [n, H] into float32 logits [n, V] of the shared vocabulary.
        vocab_size: V.
        temperature: Divides the logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        response_ids: Tensor,
        head: Callable[[Tensor], Tensor],
        vocab_size: int,
        temperature: float = 1.0,
    ) -> None:
        self._hidden = hidden
        self._response_ids = response_ids
        self._head = head
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._log_probs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self._response_ids.numel()

    def slice(self, start: int, stop: int) -> HiddenScores:
        """Scores of the response tokens start..stop-1."""
        part = HiddenScores(
            self._hidden[start:stop], self._response_ids[start:stop], self._head, self._vocab_size, self._temperature
        )
        part._log_probs = None if self._log_probs is None else self._log_probs[start:stop]
        return part

    def sampled(self) -> Tensor:
        """[N] log-probabilities of the sampled tokens."""
        return self.at(self._response_ids[:, None]).squeeze(-1)

    def at(self, token_ids: Tensor) -> Tensor:
        """[N, K] log-probabilities at the given ids [N, K]."""
        return torch.cat([part.full().gather(-1, token_ids[rows]) for rows, part in self._parts()])

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids [N, k] and their log-probabilities [N, k], likeliest first; k is clipped to V."""
        answers = [part.full().topk(min(k, self._vocab_size), dim=-1) for _, part in self._parts()]
        return torch.cat([ids for _, ids in answers]), torch.cat([log_probs for log_probs, _ in answers])

    def full(self) -> Tensor:
        """[N, V] log-probabilities of the whole vocabulary. Call it on slices."""
        if self._log_probs is None:
            with torch.no_grad():
                logits = self._head(self._hidden)
                if self._temperature != 1:
                    logits = logits / self._temperature
                self._log_probs = logits.log_softmax(dim=-1)
        return self._log_probs

    def _parts(self) -> Iterator[tuple[builtins.slice, HiddenScores]]:
        """This object itself when its log-probabilities are small enough to keep, else slices that are."""
        size = max(1, _ENTRIES_AT_ONCE // self._vocab_size)
        if self.num_tokens <= size:
            yield slice(None), self
            return
        for start in range(0, self.num_tokens, size):
            rows = slice(start, min(start + size, self.num_tokens))
            yield rows, self.slice(rows.start, rows.stop)
