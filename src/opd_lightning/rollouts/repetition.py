"""How much a response repeats itself."""

from __future__ import annotations

from torch import Tensor


def repetition_rate(token_ids: Tensor, ngram: int = 8) -> float:
    """Share of a response's n-grams that occurred earlier in the same response; 0 for responses without two n-grams.

    Args:
        token_ids: [T] response tokens.
        ngram: Length of the compared runs of tokens.
    """
    num_ngrams = len(token_ids) - ngram + 1
    if num_ngrams < 2:
        return 0.0
    windows = {tuple(window) for window in token_ids.unfold(0, ngram, 1).tolist()}
    return 1 - len(windows) / num_ngrams
