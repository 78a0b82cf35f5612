"""What a vLLM server says of a sequence, as the columns of `ListedScores`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.backends.vllm.answers import read_entry


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
