import pytest
import torch

from opd_lightning.training.schedules import WarmupDecay


def rates(steps, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupDecay(optimizer, **options)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_constant_is_constant():
    assert rates(3) == [2.0, 2.0, 2.0]


def test_warmup_reaches_the_full_rate_at_its_last_step():
    assert rates(5, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_decay_ends_at_the_final_factor():
    assert rates(6, warmup_steps=1, decay="linear", total_steps=5, final_factor=0.2) == pytest.approx(
        [2.0, 2.0, 1.6, 1.2, 0.8, 0.4]
    )


def test_cosine_is_half_way_in_the_middle_and_stays_at_the_end():
    seen = rates(8, decay="cosine", total_steps=4)
    assert seen[2] == pytest.approx(1.0)
    assert seen[4:] == pytest.approx([0.0] * 4)


def test_a_resumed_run_goes_on_along_the_curve_of_its_checkpoint():
    def make(**options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, WarmupDecay(optimizer, **options)

    whole, resumed = make(warmup_steps=2, decay="linear", total_steps=6), make(decay="cosine", total_steps=30)
    for optimizer, scheduler in [whole] * 3:
        optimizer.step()
        scheduler.step()
    for mine, other in zip(resumed, whole, strict=True):
        mine.load_state_dict(other.state_dict())
    for optimizer, scheduler in (whole, resumed):
        optimizer.step()
        scheduler.step()
    assert resumed[0].param_groups[0]["lr"] == whole[0].param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "linear"}, "total_steps"),
        ({"decay": "cosine", "total_steps": 3, "warmup_steps": 3}, "larger than warmup_steps=3"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_factor": 2.0}, "final_factor"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **options)
