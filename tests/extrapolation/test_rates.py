"""Scaled optimisers and schedulers are those that would have been built with larger rates."""

import pytest
import torch
from torch.optim import lr_scheduler

from opd_lightning.extrapolation import peak_rate, scale_rates
from opd_lightning.training.schedules import WarmupDecay

NUM_STEPS, FACTOR = 12, 37.0


def in_sequence(optimizer, rate):
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return lr_scheduler.SequentialLR(
        optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=rate / 10)], milestones=[4]
    )


def chained(optimizer, rate):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULERS = {
    "none": lambda optimizer, rate: None,
    "warm-up": lambda optimizer, rate: WarmupDecay(optimizer, 4, "linear", 16),
    "lambda": lambda optimizer, rate: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "multiplicative": lambda optimizer, rate: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "step": lambda optimizer, rate: lr_scheduler.StepLR(optimizer, 3),
    "multi-step": lambda optimizer, rate: lr_scheduler.MultiStepLR(optimizer, [2, 7]),
    "constant": lambda optimizer, rate: lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4),
    "linear": lambda optimizer, rate: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6),
    "exponential": lambda optimizer, rate: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "polynomial": lambda optimizer, rate: lr_scheduler.PolynomialLR(optimizer, 9, power=2.0),
    "cosine": lambda optimizer, rate: lr_scheduler.CosineAnnealingLR(optimizer, 9, eta_min=rate / 10),
    "restarts": lambda optimizer, rate: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, eta_min=rate / 10),
    "cyclic": lambda optimizer, rate: lr_scheduler.CyclicLR(
        optimizer, rate / 10, rate, step_size_up=4, cycle_momentum=False
    ),
    "one cycle": lambda optimizer, rate: lr_scheduler.OneCycleLR(optimizer, rate, total_steps=16),
    "plateau": lambda optimizer, rate: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=rate / 50),
    "in sequence": in_sequence,
    "chained": chained,
}


def build(kind, rate):
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": [second], "lr": 3 * rate}], lr=rate)
    return optimizer, SCHEDULERS[kind](optimizer, rate)


def advance(optimizer, scheduler, num_steps):
    rates = []
    for _ in range(num_steps):
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_schedule_scaled_on_its_way_is_the_one_built_larger(kind):
    optimizer, scheduler = build(kind, 1e-3)
    larger, its_scheduler = build(kind, FACTOR * 1e-3)
    expected = advance(larger, its_scheduler, NUM_STEPS)
    before = advance(optimizer, scheduler, 3)
    schedulers = [] if scheduler is None else [scheduler]
    scale_rates(optimizer, schedulers, FACTOR)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected[2])
    if scheduler is not None:
        assert scheduler.get_last_lr() == pytest.approx(expected[2])
    after = advance(optimizer, scheduler, NUM_STEPS - 3)
    assert before == [pytest.approx([rate / FACTOR for rate in rates]) for rates in expected[:3]]
    assert after == [pytest.approx(rates) for rates in expected[3:]]


@pytest.mark.parametrize("kind", ["none", "warm-up", "linear", "cyclic", "one cycle", "in sequence"])
def test_the_peak_of_a_schedule_is_known_at_its_first_step(kind):
    optimizer, scheduler = build(kind, 1e-3)
    assert peak_rate(optimizer, [] if scheduler is None else [scheduler]) == pytest.approx(1e-3)


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(1e-3))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    scale_rates(optimizer, [scheduler], 10.0)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(1e-2)
    optimizer.step()
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(5e-3)
    assert [float(lr) for lr in scheduler.base_lrs] == pytest.approx([1e-2])
