"""The length of a step from scores alone: right on parabolas from any start, and never worse than standing still."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.extrapolation import ScaledStep, find_step_length

decades = st.floats(-4.5, 4.5)


@given(exponent=decades, gain=st.floats(1e-3, 1e3))
@settings(max_examples=200, deadline=None)
def test_the_best_length_of_a_parabola_is_found_from_far_off(exponent, gain):
    optimum = 10.0**exponent
    calls = []

    def score(scale):
        calls.append(scale)
        return gain * (2 * scale / optimum - (scale / optimum) ** 2)

    found = find_step_length(score)
    assert found.best.scale == pytest.approx(optimum, rel=0.26)
    assert found.is_bracketed
    assert found.best.score > 0.9 * gain
    assert len(calls) <= 4 + abs(exponent) + 2
    assert calls[0] == 0 and calls[1:] == [trial.scale for trial in found.trials]


@given(
    exponent=st.floats(-3, 3), steepness=st.sampled_from([1.0, 3.0, 8.0]), fails=st.sampled_from([math.nan, -math.inf])
)
@settings(max_examples=200, deadline=None)
def test_a_cliff_behind_the_best_length_does_no_harm(exponent, steepness, fails):
    optimum = 10.0**exponent

    def score(scale):
        x = scale / optimum
        return fails if x > 4 else 2 * x - x ** (1 + steepness) if x > 1 else 2 * x - x**2

    found = find_step_length(score)
    assert found.best.score >= 0.4, found


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=40, max_size=40))
def test_what_is_kept_beats_standing_still_or_is_standing_still(values):
    scores = iter(values)
    found = find_step_length(lambda scale: next(scores))
    tried = [trial.score for trial in found.trials if math.isfinite(trial.score)]
    if found.best.scale > 0:
        assert found.best.score > found.standing
        assert found.best in found.trials
        assert found.best.score == max(tried)
    else:
        assert not math.isfinite(found.standing) or all(score <= found.standing for score in tried)
    assert all(trial.scale > 0 for trial in found.trials)


@pytest.mark.parametrize(
    ("score", "scale", "is_bracketed"),
    [
        (lambda scale: 0.0, 0.0, True),  # ties say nothing
        (lambda scale: -scale, 0.0, True),  # uphill is the other way
        (lambda scale: math.nan, 0.0, False),
        (lambda scale: scale, 1e8, False),  # no end in sight
    ],
)
def test_lines_without_a_best_length(score, scale, is_bracketed):
    found = find_step_length(score)
    assert found.best.scale == pytest.approx(scale)
    assert found.is_bracketed is is_bracketed


def test_standing_still_is_reported_with_its_score():
    found = find_step_length(lambda scale: -1.0 - scale)
    assert found.best == ScaledStep(0.0, -1.0) and found.standing == -1.0
    assert [trial.scale for trial in found.trials] == pytest.approx([10.0**-k for k in range(9)])
