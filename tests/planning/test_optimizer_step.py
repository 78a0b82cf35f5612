"""An optimiser's step without data, against what a real one holds."""

from functools import partial

import pytest
import torch
from torch import nn

from opd_lightning.backends.hf.weightless import without_data
from opd_lightning.planning.counting import OperationCounter
from opd_lightning.planning.optimizer_step import OptimizerStep

SHAPES = [(900, 700), (900, 700), (64,), (40, 80)]


def make_weights():
    weights = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    for each in weights:
        each.grad = torch.ones_like(each)
    return weights


@pytest.mark.parametrize("name", ["torch.AdamW", "torch.AdamW fused", "torch.Adafactor", "bitsandbytes.AdamW8bit"])
def test_what_is_held_is_what_a_real_one_holds(name):
    package, _, words = name.partition(".")
    module = pytest.importorskip(f"{package}.optim")
    kind, _, fused = words.partition(" ")
    make = partial(getattr(module, kind), lr=1e-3, **({"fused": True} if fused else {}))
    optimizer = make(make_weights())
    optimizer.step()
    state = [each for values in optimizer.state.values() for each in values.values() if isinstance(each, torch.Tensor)]
    real = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in state}.values())
    with without_data(), OperationCounter(lambda operation: 0.0) as counter:
        weights = make_weights()
        with counter.part("state"):
            step = OptimizerStep(make, weights)
        assert step.is_fused == bool(fused)
        counter.restart()
        step.step()
    assert counter.live["state"] == pytest.approx(real, abs=8192)
    assert counter.peak["state"] == counter.live["state"] and counter.bytes >= 8 * sum(w.numel() for w in weights)
