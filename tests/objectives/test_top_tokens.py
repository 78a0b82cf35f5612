import math

import pytest
import torch

from opd_lightning.objectives.top_tokens import top_tokens


@pytest.mark.parametrize("size", [1, 5, 64, 1000, 1024, 4099])
@pytest.mark.parametrize("k", [1, 2, 16])
def test_they_are_those_of_topk(size, k):
    scores = torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    scores[2], scores[3, : size // 2] = 0.0, -math.inf  # equal entries may be listed in any order
    k = min(k, size)
    values, ids = top_tokens(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(-1, ids), values)
    assert all(len(set(row.tolist())) == k for row in ids)


def test_no_positions_have_none():
    values, ids = top_tokens(torch.empty(0, 1000), 4)
    assert values.shape == ids.shape == (0, 4)


def test_entries_that_are_no_numbers_come_first_as_in_topk():
    scores = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    scores[0, 437] = math.nan
    assert top_tokens(scores, 3)[1][0, 0] == 437
