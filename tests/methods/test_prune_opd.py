"""Prune-OPD (arXiv 2605.07804): weights that fade with every bad token, and the length controller."""

import pytest
import torch
from weighed import step, trained, weigh

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.methods import DriftWeights, PruningHorizon
from opd_lightning.training.checks import check_horizon


def response(*overlaps):
    return trained({"overlap_ratio": list(overlaps)})


def test_weights_are_those_of_the_equation_and_never_rise():
    generator = torch.Generator().manual_seed(0)
    overlaps = torch.rand(300, generator=generator)
    (weights,) = weigh(DriftWeights(), response(*overlaps.tolist()))
    bad, expected = 0, []
    for overlap in overlaps.tolist():
        bad += overlap < 0.7
        expected.append(max(0.0, 1 - 0.01 * bad) + 0.5)
    assert weights == pytest.approx(expected)
    assert weights == sorted(weights, reverse=True)


def test_without_a_bad_token_all_count_alike_and_after_a_hundred_the_trust_is_gone():
    assert weigh(DriftWeights(), response(1.0, 0.7, 0.9)) == [[1.5, 1.5, 1.5]]
    (weights,) = weigh(DriftWeights(), response(*[0.0] * 101))
    assert weights[98] == pytest.approx(0.51)
    assert weights[99:] == [0.5, 0.5]
    assert weigh(DriftWeights(drop=0.0), response(0.0, 0.0)) == [[1.5, 1.5]]


def test_by_the_other_sign_a_bad_token_is_one_outside_of_the_teachers_nucleus():
    weighting = DriftWeights(sign="nucleus", drop=0.25)
    assert weighting.reads == ("teacher_mass_above",) and DriftWeights().reads == ("overlap_ratio",)
    above = trained({"teacher_mass_above": [0.0, 0.94, 0.95, 0.1, 1.0]})
    assert weigh(weighting, above) == [[1.5, 1.5, 1.25, 1.25, 1.0]]
    assert weigh(DriftWeights(sign="nucleus", nucleus=0.1, drop=0.25), above) == [[1.5, 1.25, 1.0, 0.75, 0.5]]
    each = horizon(sign="nucleus", patience=1)
    each.observe(step(trained({"teacher_mass_above": [0.0] * 4 + [1.0] * 16}), number=0))
    assert each.num_tokens(1) == 10


def horizon(**settings):
    return PruningHorizon(**({"start": 20, "least": 5, "most": 30, "change": 10, "margin": 2, "drop": 0.5} | settings))


def test_the_horizon_moves_by_its_change_only_and_within_its_bounds():
    each = horizon(patience=2)
    assert each.num_tokens(0) == 20
    each.observe(step(response(*[1.0] * 18), response(0.0), number=0))  # half of them are trusted to within the margin
    assert each.num_tokens(1) == 30
    each.observe(step(response(*[1.0] * 30), number=1))
    assert each.num_tokens(2) == 30
    lengths = []
    for number in range(2, 8):
        each.observe(step(response(*[1.0] * 10, *[0.0] * 20), number=number))  # the second bad token ends the trust
        lengths.append(each.num_tokens(number + 1))
    assert lengths == [30, 20, 20, 10, 20, 20]


def test_a_step_is_judged_by_the_horizon_it_was_generated_with():
    each = horizon()
    assert [each.num_tokens(0), each.num_tokens(1)] == [20, 20]  # the next step is settled before this one is trained
    each.observe(step(response(*[1.0] * 20), number=0))
    assert each.num_tokens(2) == 30
    each.observe(step(response(*[1.0] * 18), number=1))  # within the margin of its own 20, not of 30
    assert each.state_dict()["misses"] == 0


def test_what_can_never_be_reached_keeps_the_horizon():
    never = horizon(share=1.1, patience=10**9)
    for number in range(20):
        never.num_tokens(number)
        never.observe(step(response(*[1.0] * 20), number=number))
    assert never.num_tokens(20) == 20


def test_a_resumed_horizon_goes_on():
    one, other = horizon(patience=2), horizon(patience=2)
    one.num_tokens(0)
    one.observe(step(response(0.0), number=0))
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.observe(step(response(0.0), number=1))
    assert one.state_dict() == other.state_dict()
    assert one.num_tokens(2) == 10
    one.load_state_dict({})
    assert one.num_tokens(2) == 20


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"data\.horizon\.start: expected 1 <= least=1024 <= start=64 <= most=12288"):
        PruningHorizon(start=64)
    with pytest.raises(ValueError, match=r"model\.token_weighting\.overlap: expected a share from 0 to 1, got 2"):
        DriftWeights(overlap=2)
    with pytest.raises(ValueError, match=r"data\.horizon: PruningHorizon follows overlap_ratio, which this run does"):
        check_horizon(PruningHorizon(), ScoreRequest(), 16)
    check_horizon(PruningHorizon(), ScoreRequest(top_k=16), 16)
