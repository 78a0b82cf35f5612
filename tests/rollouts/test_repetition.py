"""How much a response repeats itself."""

import pytest
import torch

from opd_lightning.rollouts.repetition import repetition_rate


def test_repetition_rate_counts_repeated_ngrams():
    assert repetition_rate(torch.arange(20), ngram=4) == 0
    assert repetition_rate(torch.tensor([1, 2] * 5), ngram=2) == pytest.approx(1 - 2 / 9)
    assert repetition_rate(torch.tensor([1, 2]), ngram=4) == 0
