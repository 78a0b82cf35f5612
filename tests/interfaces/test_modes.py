import pytest
from torch import nn

from opd_lightning.interfaces.modes import evaluation_mode


def test_every_part_gets_its_own_mode_back_after_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))).train()
    model[1][0].eval()
    expected = [part.training for part in model.modules()]
    with evaluation_mode(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == expected
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        1 / model.training
    assert [part.training for part in model.modules()] == expected
