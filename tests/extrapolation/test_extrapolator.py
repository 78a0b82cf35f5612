"""Counting, searching, giving up, saving and resuming."""

import math
import random
import warnings

import numpy
import pytest
import torch
from torch import nn

from opd_lightning.extrapolation import Extrapolator, LineSearch, Schedule, isolated_rng, undisturbed


def make(weight, **options):
    schedule = Schedule(options.pop("schedule", 1))
    extrapolator = Extrapolator(LineSearch(**options), schedule)
    extrapolator.start({"w": weight})
    return extrapolator


def descend(weight, target, rate=0.01):
    with torch.no_grad():
        weight += rate * (target - weight)


def distance(weight, target):
    return -float((weight.detach() - target).norm())


def test_on_a_bowl_the_distance_shrinks_faster():
    target = torch.linspace(-1, 1, 6)
    plain, helped = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    extrapolator = make(helped, schedule="powers_of_two")
    for _ in range(64):
        descend(plain, target)
        descend(helped, target)
        extrapolator.count_step()
        if extrapolator.is_due:
            assert extrapolator.search(lambda: distance(helped, target)) is not None
    assert extrapolator.num_searches == 7
    assert distance(helped, target) > 0.05 * distance(plain, target)


def test_the_report_says_what_happened():
    weight = nn.Parameter(torch.zeros(2))
    extrapolator = make(weight, candidates=(2, 4), backward=(-0.5,))
    spent = iter([10, 25])
    for _ in range(2):
        extrapolator.count_step()
    with torch.no_grad():
        weight += torch.tensor([3.0, 4.0])
    scores = {3.0: 1.0, 9.0: 0.5, 1.5: 2.0}
    report = extrapolator.search(lambda: scores[weight[0].item()], count_tokens=lambda: next(spent))
    assert (report.step, report.baseline, report.delta_norm, report.tokens) == (2, 1.0, 5.0, 15)
    assert [(trial.factor, trial.score) for trial in report.trials] == [(2.0, 0.5), (-0.5, 2.0)]
    assert (report.best.factor, report.best.score, report.accepted) == (-0.5, 2.0, True)
    assert weight.tolist() == [1.5, 2.0]
    metrics = report.metrics()
    assert metrics["effopd/factor"] == -0.5
    assert metrics["effopd/score_at/+2"] == 0.5
    assert metrics["effopd/num_candidates"] == 2
    assert "effopd/cosine" not in metrics
    text = str(report)
    assert text.startswith("EffOPD step 2: moved by -0.5 Delta (score 1; tried +2: 0.5, -0.5: 2; |Delta| 5;")
    assert "15 tokens" in text
    assert extrapolator.summary().startswith("EffOPD: 1 searches, 1 accepted, ")


def test_rejection_and_a_raising_score_restore_every_bit():
    weight = nn.Parameter(torch.randn(50))
    extrapolator = make(weight)
    descend(weight, torch.ones(50))
    extrapolator.count_step()
    before = weight.detach().clone()

    def breaks_at_a_candidate():
        if not torch.equal(weight, before):
            raise ArithmeticError("no")
        return 0.0

    edits = []
    with pytest.raises(ArithmeticError):
        extrapolator.search(breaks_at_a_candidate, after_edit=lambda: edits.append(weight.detach().clone()))
    assert torch.equal(weight, before)
    assert len(edits) == 2  # the candidate and the way back were both announced
    assert torch.equal(edits[1], before)
    assert extrapolator.is_due
    report = extrapolator.search(lambda: float(torch.equal(weight, before)))
    assert not report.accepted
    assert torch.equal(weight, before)
    assert not extrapolator.is_due


@pytest.mark.parametrize("accept", ["not_worse", "better"])
def test_when_all_scores_tie_no_bit_moves_and_the_report_says_so(accept):
    plain, searched = nn.Parameter(torch.randn(50)), nn.Parameter(torch.zeros(50))
    with torch.no_grad():
        searched.copy_(plain)
    extrapolator = make(searched, accept=accept, backward=(-0.5,), schedule="adaptive")
    searches = []
    for _ in range(8):
        descend(plain, torch.ones(50))
        descend(searched, torch.ones(50))
        extrapolator.count_step()
        if extrapolator.is_due:
            report = extrapolator.search(lambda: 0.0)
            searches.append(report.step)
            assert torch.equal(plain, searched)
            assert (report.tied, report.accepted, report.best.factor) == (True, False, 0.0)
            assert "not moved, since all scores tie, which says nothing about the direction (score 0;" in str(report)
            assert report.metrics()["effopd/tied"] == 1.0
    assert searches == [1, 3, 7]  # as after searches that failed
    assert extrapolator.num_tied == 3
    assert "3 searches, 0 accepted, 3 tied, " in extrapolator.summary()
    assert extrapolator.totals()["effopd/num_tied"] == 3
    again = Extrapolator(LineSearch(), Schedule())
    again.load_state_dict(extrapolator.state_dict())
    assert again.num_tied == 3


def test_nothing_is_scored_without_a_direction():
    weight = nn.Parameter(torch.ones(3))
    extrapolator = make(weight)
    extrapolator.count_step()
    assert extrapolator.search(pytest.fail) is None
    assert not extrapolator.is_due
    with torch.no_grad():
        weight[0] = math.nan
    extrapolator.count_step()
    with pytest.warns(UserWarning, match="not finite"):
        assert extrapolator.search(pytest.fail) is None
    assert extrapolator.num_searches == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_failure(bad):
    weight = nn.Parameter(torch.zeros(3))
    extrapolator = make(weight)
    for baseline, num_trials in ((1.0, 1), (bad, 0)):
        descend(weight, torch.ones(3))
        extrapolator.count_step()
        before = weight.detach().clone()
        report = extrapolator.search(lambda: baseline if torch.equal(weight, before) else bad)  # noqa: B023
        assert len(report.trials) == num_trials
        assert not report.accepted
        assert torch.equal(weight, before)


@pytest.mark.parametrize("schedule", ["powers_of_two", "adaptive"])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_restored_state_goes_on_bit_for_bit(stop, schedule, tmp_path):
    target = torch.linspace(-1, 1, 6)

    def run(weight, extrapolator, steps):
        reports = []
        for _ in range(steps):
            descend(weight, target)
            extrapolator.count_step()
            if extrapolator.is_due:
                reports.append(extrapolator.search(lambda: distance(weight, target)))
        return reports

    whole = nn.Parameter(torch.zeros(6))
    extrapolator = make(whole, schedule=schedule)
    reports = run(whole, extrapolator, 20)

    weight = nn.Parameter(torch.zeros(6))
    first = make(weight, schedule=schedule)
    run(weight, first, stop)
    torch.save({"weight": weight.detach(), "state": first.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = nn.Parameter(loaded["weight"].clone())
    second = Extrapolator(LineSearch(), Schedule(schedule))
    second.load_state_dict(loaded["state"])
    second.start({"w": resumed})
    later = run(resumed, second, 20 - stop)
    assert torch.equal(resumed, whole)
    assert [(r.step, r.trials, r.delta_norm, str(r.cosine)) for r in later] == [
        (r.step, r.trials, r.delta_norm, str(r.cosine)) for r in reports[-len(later) :]
    ]
    assert second.num_searches == extrapolator.num_searches


def test_new_weights_join_with_their_own_anchor():
    weight, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    extrapolator = make(weight, candidates=(2,))
    descend(weight, torch.ones(2), rate=0.5)
    extrapolator.replace({"w": weight, "late": late})
    descend(late, torch.ones(2), rate=0.25)
    extrapolator.count_step()
    extrapolator.search(lambda: weight[0].item())
    assert weight.tolist() == [1.5, 1.5]
    assert late.tolist() == [0.75, 0.75]


def test_unknown_lora_step_is_refused():
    with pytest.raises(ValueError, match="lora: expected 'factors' or 'product', got 'both'"):
        Extrapolator(LineSearch(), Schedule(), lora="both")


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_random_states_are_put_back_and_the_seed_decides_inside():
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    with isolated_rng(7):
        inside = draws()
    outside = draws()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    assert outside == draws()
    with pytest.raises(ZeroDivisionError), isolated_rng(7):
        1 / (draws() != inside)
    after = draws()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    draws()
    assert after == draws()


def test_modes_are_restored_part_by_part():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    module.train()
    module[1][0].eval()
    expected = [part.training for part in module.modules()]
    with undisturbed(module, seed=0):
        assert not any(part.training for part in module.modules())
        assert not module[1][1](torch.ones(1, 2)).requires_grad
    assert [part.training for part in module.modules()] == expected
    with pytest.raises(ZeroDivisionError), undisturbed(module, seed=0):
        1 / module.training
    assert [part.training for part in module.modules()] == expected
    assert torch.is_grad_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with undisturbed(None, seed=0):
            assert not torch.is_grad_enabled()
