"""What a process asks the others."""

import pytest
from torch import distributed as dist

from opd_lightning import distributed
from opd_lightning.distributed import OutOfReach, alone, gather_objects


def test_one_process_is_everybody():
    assert gather_objects("mine") == ["mine"]
    with alone():
        assert gather_objects("mine") == ["mine"]


def test_a_process_that_acts_alone_asks_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda everyone, mine: everyone.__setitem__(slice(None), [mine, "b"])
    )
    assert gather_objects("a") == ["a", "b"]
    with pytest.raises(OutOfReach, match="part of it lies on the other processes"), alone():
        gather_objects("a")
    assert gather_objects("a") == ["a", "b"]
