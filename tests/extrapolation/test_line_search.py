"""The accept rule against a reference that is written out step by step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.extrapolation import LineSearch, Schedule
from opd_lightning.extrapolation.line_search import all_tie
from opd_lightning.extrapolation.schedule import next_pause

SCORES = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([math.nan, math.inf, -math.inf]))
FORWARD = st.lists(st.integers(1, 20), min_size=1, max_size=5, unique=True).map(sorted)
BACKWARD = st.lists(st.integers(1, 4), max_size=3, unique=True).map(lambda xs: [-x / 4 for x in sorted(xs)])


def reference(scores, forward, backward, strict, margin):
    """Factors tried, in order, and the factor kept."""
    kept, tried = 0.0, []
    if not math.isfinite(scores[0.0]):
        return tried, kept
    for factors in (forward, backward):
        for factor in factors:
            tried.append(factor)
            gain = scores[factor] - scores[kept] - margin if math.isfinite(scores[factor]) else -1.0
            if gain < 0 or (strict and gain == 0):
                break
            kept = factor
        if kept != 0:
            break
    return tried, 0.0 if all(scores[factor] == scores[0.0] for factor in tried) else kept


@given(FORWARD, BACKWARD, st.booleans(), st.sampled_from([0.0, 1.0]), st.data())
def test_agrees_with_the_reference(forward, backward, strict, margin, data):
    scores = {factor: data.draw(SCORES) for factor in (0.0, *forward, *backward)}
    search = LineSearch(forward, backward, "better" if strict else "not_worse", margin)
    asked = []
    outcome = search.run(lambda factor: asked.append(factor) or scores[factor])
    tried, kept = reference(scores, forward, backward, strict, margin)
    assert asked == [0.0, *tried]
    assert [trial.factor for trial in outcome.trials] == tried
    assert (outcome.best.factor, outcome.best.score) == (kept, scores[kept]) or math.isnan(scores[kept])


@given(FORWARD, BACKWARD)
def test_a_constant_score_moves_nothing_whatever_ties_count_as(forward, backward):
    for accept, tried in (("not_worse", forward), ("better", [forward[0], *backward[:1]])):
        outcome = LineSearch(forward, backward, accept).run(lambda _: 1.0)
        assert outcome.best.factor == 0
        assert [trial.factor for trial in outcome.trials] == tried
        assert all_tie(outcome.baseline, outcome.trials)


@pytest.mark.parametrize(
    ("scores", "kept", "tied"),
    [
        ({0: 0, 2: 0, 4: 1}, 4, False),  # ties on the way to a gain
        ({0: 0, 2: 0, 4: -1}, 2, False),  # the score can tell points apart, so its tie is the paper's
        ({0: 0, 2: -1, -0.5: 0}, -0.5, False),
        ({0: 0, 2: 0, 4: 0}, 0, True),
        ({0: 0, 2: 0, 4: 0, -0.5: 1}, 0, True),  # nothing failed, so nobody looks back
        ({0: 0, 2: 0, 4: math.nan}, 2, False),
    ],
)
def test_a_tie_is_kept_where_another_score_differs(scores, kept, tied):
    outcome = LineSearch((2, 4), (-0.5,), "not_worse").run(lambda factor: float(scores[factor]))
    assert outcome.best.factor == kept
    assert all_tie(outcome.baseline, outcome.trials) == tied


def test_no_candidate_scored_is_no_tie():
    outcome = LineSearch().run(lambda _: math.nan)
    assert not all_tie(outcome.baseline, outcome.trials)


def test_ties_are_measured_against_the_best_so_far():
    scores = {0.0: 0.0, 2.0: 3.0, 4.0: 2.0, 6.0: 9.0}
    outcome = LineSearch((2, 4, 6)).run(scores.__getitem__)
    assert outcome.best.factor == 2  # 4 beats the current weights, but not the point at 2; 6 is never looked at
    assert [trial.factor for trial in outcome.trials] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": ()}, "candidates: expected at least one"),
        ({"candidates": (2, 2)}, "candidates: expected positive, increasing"),
        ({"candidates": (0, 2)}, "candidates: expected positive, increasing"),
        ({"candidates": (2, math.inf)}, "candidates: expected positive, increasing"),
        ({"backward": (0.5,)}, "backward: expected negative, decreasing"),
        ({"backward": (-0.5, -0.25)}, "backward: expected negative, decreasing"),
        ({"accept": "maybe"}, "accept: expected 'not_worse' or 'better', got 'maybe'"),
        ({"min_improvement": -1.0}, "min_improvement: expected a finite number of at least 0"),
        ({"min_improvement": math.nan}, "min_improvement: expected a finite number of at least 0"),
    ],
)
def test_refuses_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LineSearch(**arguments)


POWERS = {2**n for n in range(20)}


@pytest.mark.parametrize(
    ("spec", "due"),
    [
        ("powers_of_two", lambda step: step in POWERS),
        (1, lambda step: True),
        (5, lambda step: step % 5 == 0),
        ([3, 4, 17], lambda step: step in (3, 4, 17)),
    ],
)
@given(settled=st.integers(0, 70), later=st.integers(0, 9))
def test_a_search_is_due_when_a_scheduled_step_was_passed(spec, due, settled, later):
    expected = any(due(step) for step in range(settled + 1, settled + later + 1))
    assert Schedule(spec).is_due(settled, settled + later) == expected


def test_the_pause_of_the_adaptive_schedule_follows_the_successes():
    schedule = Schedule("adaptive")
    assert schedule.is_due(0, 1) and not schedule.is_due(8, 11, pause=4) and schedule.is_due(8, 12, pause=4)
    pauses = [1]
    for accepted in (False, False, False, False, False, True, True, True, True):
        pauses.append(next_pause(pauses[-1], accepted=accepted))
    assert pauses == [1, 2, 4, 8, 16, 16, 8, 4, 2, 2]


@pytest.mark.parametrize("spec", ["often", 0, -1, True, 2.5, None, [], [0, 1], [4, 3], [3, 3], [1.5]])
def test_refuses_other_schedules(spec):
    with pytest.raises(ValueError, match="schedule: expected 'powers_of_two', 'adaptive', 'rounds', an integer"):
        Schedule(spec)
