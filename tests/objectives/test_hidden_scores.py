"""Scores kept as hidden states: log-probabilities on request, in parts, the head run once."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.interfaces import LinearHead
from opd_lightning.objectives import HiddenScores, hidden_scores

VOCAB_SIZE = 81


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    hidden, ids = torch.randn(11, 5, generator=generator), torch.randint(0, VOCAB_SIZE, (11,), generator=generator)
    return hidden, ids, LinearHead(torch.randn(VOCAB_SIZE + 3, 5, generator=generator), None, VOCAB_SIZE)


@pytest.fixture
def head_calls(monkeypatch):
    """How many logits each run of a head computed."""
    calls, run = [], LinearHead.__call__

    def counted(self, hidden):
        calls.append(len(hidden) * self.num_rows)
        return run(self, hidden)

    monkeypatch.setattr(LinearHead, "__call__", counted)
    return calls


@pytest.mark.parametrize("entries", [1, 3 * VOCAB_SIZE, 2**27])
def test_slices_and_parts_give_the_same(monkeypatch, parts, head_calls, entries):
    monkeypatch.setattr(hidden_scores, "_ENTRIES_AT_ONCE", entries)
    hidden, ids, head = parts
    result = HiddenScores(hidden, ids, head, temperature=2.0)
    expected = (hidden @ head.weight[:VOCAB_SIZE].T / 2).log_softmax(-1)
    torch.testing.assert_close(result.sampled(), expected.gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(result.topk(3)[1], expected.topk(3).values)
    assert max(head_calls) <= max(entries, VOCAB_SIZE)
    part = result.slice(4, 9)
    assert part.num_tokens == 5
    torch.testing.assert_close(part.full(), expected[4:9])
    torch.testing.assert_close(part.slice(1, 3).sampled(), expected[5:7].gather(1, ids[5:7, None])[:, 0])


def test_a_slice_runs_the_head_once(parts, head_calls):
    part = HiddenScores(*parts).slice(2, 9)
    assert head_calls == []
    part.sampled(), part.topk(4), part.at(torch.zeros(7, 2, dtype=torch.int64)), part.full()
    assert head_calls == [7 * VOCAB_SIZE]
