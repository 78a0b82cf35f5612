"""The cache that has room: the same keys and values as transformers' own, which copies everything for every token."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from transformers import DynamicCache

from opd_lightning.backends.hf.anatomy import decoder_config
from opd_lightning.backends.hf.cache import RoomyCache

WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def states(num_rows: int, num_columns: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, 2, num_columns, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["full", "window and full"])
def test_it_holds_what_a_growing_cache_holds(options):
    config = decoder_config(make_model("gemma3_text" if options else "qwen3", **options))
    roomy, plain = RoomyCache(config, "cpu", most=200), DynamicCache(config=config)
    rows = 3
    for token in range(60):
        if token % 7 == 6:  # rows leave, or are repeated
            kept = torch.tensor([0, *range(rows)] if token < 30 else range(rows - 1))
            rows = len(kept)
            roomy.reorder_cache(kept)
            plain.reorder_cache(kept)
        for layer in range(2):
            columns = 5 if token == 0 else 1
            new = states(rows, columns, 2 * token + layer), states(rows, columns, 1000 + 2 * token + layer)
            for ours, theirs in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(ours, theirs)
        assert roomy.get_seq_length() == plain.get_seq_length()


def test_columns_are_copied_a_few_times_in_all_and_never_more_room_is_taken_than_needed():
    cache = RoomyCache(decoder_config(make_model("qwen3")), "cpu", most=1_010)
    copied, address = 0, None
    for token in range(1_000):
        columns = 11 if token == 0 else 1
        keys, _ = cache.update(states(1, columns, 0), states(1, columns, 1), 0)
        if keys.data_ptr() != address:
            copied, address = copied + keys.shape[-2] - columns, keys.data_ptr()
        assert keys.untyped_storage().nbytes() <= 1_010 * 2 * 8 * 4
    assert 0 < copied < 6 * 1_010
