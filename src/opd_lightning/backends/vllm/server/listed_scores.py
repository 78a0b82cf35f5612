"""Teacher scores as a vLLM server gives them: the sampled token and the likeliest k of each position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.backends.vllm.answers import read_entry
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

    def slice(self, start: int, stop: int) -> ListedScores:
        """Scores of the response tokens start..stop-1."""
        columns = (self.response_ids, self._sampled, self._ids, self._log_probs)
        return ListedScores(*(column[start:stop] for column in columns))

    def columns(self) -> dict[str, Tensor]:
        """The four lists."""
        return {
            "response_ids": self.response_ids,
            "sampled": self._sampled,
            "ids": self._ids,
            "log_probs": self._log_probs,
        }

    def from_columns(self, columns: Mapping[str, Tensor]) -> ListedScores:
        """From such lists."""
        return ListedScores(**columns)

    def sampled(self) -> Tensor:
        """[N] log-probabilities of the sampled tokens."""
        return self._sampled

    def at(self, token_ids: Tensor) -> Tensor:
        """Not offered: a server scores the tokens it is sent, and its own favourites."""
        raise AssertionError("a teacher server was asked for ids it did not offer")

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids [N, k] and their log-probabilities [N, k], likeliest first."""
        assert k <= self._ids.shape[1], f"asked for {k} of {self._ids.shape[1]}"
        return self._ids[:, :k], self._log_probs[:, :k]

    def full(self) -> Tensor:
        """Not offered."""
        raise AssertionError("a teacher server was asked for the full vocabulary, which it did not offer")


def read_scores(
    entries: Sequence[Any], token_ids: Sequence[int], places: Sequence[int], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the scores of one sequence's response tokens from `prompt_logprobs`.

    An entry holds the actual token and the likeliest k, in no particular order and k or k + 1 of them.

    Args:
        entries: One per token of the sequence (`scored_tokens`): string of the id to ``{"logprob": ...}``.
        token_ids: The sequence.
        places: Indices of the N tokens to score.
        k: Size of the top-k list; 0 leaves it empty.

    Returns:
        Sampled log-probabilities [N], ids [N, k] and their log-probabilities [N, k].

    Raises:
        UnfitAnswer: The answer does not fit the question.
    """
    sampled, ids, log_probs = [], [], []
    for place in places:
        scores = read_entry(entries[place], token_ids[place], k)
        sampled.append(scores[token_ids[place]])
        if k:
            likeliest = sorted(((log_prob, token_id) for token_id, log_prob in scores.items()), reverse=True)[:k]
            log_probs.append([log_prob for log_prob, _ in likeliest])
            ids.append([token_id for _, token_id in likeliest])
    num_tokens = len(sampled)
    return (
        torch.tensor(sampled, dtype=torch.float32),
        torch.tensor(ids, dtype=torch.int64).view(num_tokens, k),
        torch.tensor(log_probs, dtype=torch.float32).view(num_tokens, k),
    )
