import pytest
import torch

from opd_lightning.training.stopwatch import Stopwatch


@pytest.mark.parametrize(("is_exact", "num_waits"), [(True, 2), (False, 0)])
def test_waiting_for_the_gpu_can_be_switched_off(monkeypatch, is_exact, num_waits):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    watch = Stopwatch(torch.device("cuda"), is_exact=is_exact)
    with watch("part"):
        pass
    assert len(waits) == num_waits
    assert watch.seconds["part"] >= 0
