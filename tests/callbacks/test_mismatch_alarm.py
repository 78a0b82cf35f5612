"""The alarm rings when engine and student differ, not too often, and never for what is unknown."""

import warnings
from types import SimpleNamespace

import pytest

from opd_lightning.callbacks.mismatch import MismatchAlarm


def run(alarm, values, first_step=1):
    rung = []
    for step, value in enumerate(values, first_step):
        metrics = {"train/rollout_mismatch": value, "train/rollout_mismatch_max": 4 * value}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            alarm.on_train_batch_end(SimpleNamespace(callback_metrics=metrics, global_step=step), None)
        rung += [(step, str(warning.message)) for warning in caught]
    return rung


def test_it_rings_above_the_threshold_and_says_what_to_check():
    ((step, message),) = run(MismatchAlarm(0.1), [0.02, 0.1, 0.25, 0.01])
    assert step == 3 and "by 0.25 nats on average (threshold 0.1; largest 1)" in message
    assert "got this step's weights" in message and "kv_cache_dtype" in message


def test_it_rings_every_so_often():
    assert [step for step, _ in run(MismatchAlarm(0.1, every_n_steps=3), [1.0] * 8)] == [1, 4, 7]


def test_what_is_not_known_is_no_alarm():
    assert run(MismatchAlarm(), [float("nan")] * 3) == []
    MismatchAlarm().on_train_batch_end(SimpleNamespace(callback_metrics={}, global_step=1), None)


@pytest.mark.parametrize("options", [{"threshold": 0}, {"every_n_steps": -1}])
def test_numbers_must_be_positive(options):
    with pytest.raises(ValueError, match=rf"MismatchAlarm\.{next(iter(options))}: expected a positive number"):
        MismatchAlarm(**options)
