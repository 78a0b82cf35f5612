"""Uni-OPD (arXiv 2605.03677): whole answers shifted, or left out, until right ones lead wrong ones by a margin."""

import math

import pytest
import torch
from objective_cases import make_case

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.methods import Margin, MarginMask, MarginShift
from opd_lightning.objectives import SampledTokenObjective
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.shaping import attach

RATIOS = [[-0.5, -0.1], [-0.9], [0.2, 0.4, 0.0], [-0.1, -0.3]]  # returns -0.3, -0.9, 0.2, -0.2
MARKS = [1.0, 1.0, 0.0, 0.0]


def group_of(marks=MARKS, ratios=RATIOS):
    def rollout(seed, mark, values):
        ids = torch.arange(len(values))
        made = Rollout(Problem("a", ()), torch.tensor([1]), ids, torch.zeros(len(ids)), True, seed=seed, reward=mark)
        return attach(made, log_ratio=torch.tensor(values))

    return [rollout(seed, *pair) for seed, pair in enumerate(zip(marks, ratios, strict=True))]


def advantages(advantage, group):
    """Of every token, answer by answer: the rewards are the log-ratios."""
    [shaped] = SampledTokenObjective(advantage=advantage).shape([group])
    batch = collate(shaped, 0)
    rewards = batch.tokens.extras["log_ratio"].double()
    return batch.by_rollout(advantage(rewards, None, None, batch.tokens))


def returns(parts):
    return torch.stack([part.mean() for part in parts])


@pytest.mark.parametrize("direction", ["spread", "lift", "lower"])
@pytest.mark.parametrize("statistic", ["mean", "minmax"])
def test_after_the_shift_the_lead_is_the_margin_and_inside_an_answer_nothing_changed(statistic, direction):
    margin = Margin(0.4, statistic)
    parts = advantages(MarginShift(margin, direction), group_of())
    is_right = torch.tensor(MARKS) == 1
    assert margin.lead(returns(parts), is_right) == pytest.approx(0.4)
    for part, before in zip(parts, RATIOS, strict=True):
        torch.testing.assert_close(part - part[0], torch.tensor(before).double() - before[0])
    moved = returns(parts) - torch.tensor([-0.3, -0.9, 0.2, -0.2])
    missing = 0.4 - {"mean": -0.6 - 0.0, "minmax": -0.9 - 0.2}[statistic]
    up, down = {"spread": (0.5, 0.5), "lift": (1, 0), "lower": (0, 1)}[direction]
    expected = torch.tensor([up, up, -down, -down], dtype=torch.float64) * missing
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("advantage", [MarginShift(), MarginMask()], ids=["shift", "mask"])
@pytest.mark.parametrize("marks", [[1.0] * 4, [0.0] * 4, [0.0, 0.0, 1.0, 1.0]], ids=["right", "wrong", "leading"])
def test_groups_of_one_kind_and_those_that_lead_enough_stay_as_they_are(advantage, marks):
    for part, before in zip(advantages(advantage, group_of(marks)), RATIOS, strict=True):
        torch.testing.assert_close(part.float(), torch.tensor(before))


def test_the_mask_leaves_out_the_most_harmful_answers_and_no_more_than_it_must():
    def kept(**settings):
        return [bool(part.abs().sum() > 0) for part in advantages(MarginMask(**settings), group_of())]

    assert kept(margin=Margin(0)) == [True, False, False, True]  # lead -0.6, -0.3 without the second, then -0.1
    assert kept(margin=Margin(-0.0), least_kept=0.75) == [True, False, True, True]
    assert kept(margin=Margin(0), least_kept=1.0) == [True] * 4
    assert kept(margin=Margin(5)) == [True, False, False, True]  # one of each kind stays


def test_log_ratios_are_clipped_before_they_are_shifted():
    objective = SampledTokenObjective(advantage=MarginShift(), advantage_clip=0.1)
    [shaped] = objective.shape([group_of()])
    shift = float(shaped[0].extras["margin"][0])
    lead = (-0.1 - 0.1) / 2 - ((0.1 + 0.1 + 0.0) / 3 - 0.1) / 2
    assert shift == pytest.approx((0.4 - lead) / 2)


def test_what_it_reads_reaches_the_loss():
    case = make_case(n=2)
    [shaped] = MarginShift().shape([group_of([1.0, 0.0], [[-1.0], [0.0]])])
    tokens = collate(shaped, 0).tokens
    assert MarginShift()(torch.zeros(2), case.logits, case.scores(), tokens).tolist() == pytest.approx([0.7, -0.7])
    assert SampledTokenObjective(advantage=MarginShift()).needs_log_ratios


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MarginShift().shape([group_of()[:1]]), r"data\.rollouts_per_prompt: .*MarginShift.*got 1\. Set it"),
        (lambda: MarginMask().shape([group_of([math.nan] * 4)]), r"data\.task: .*MarginMask needs marked answers"),
        (lambda: Margin(-1), r"margin\.wanted: expected a number of at least 0"),
        (lambda: Margin(statistic="median"), r"margin\.statistic: expected one of mean, minmax"),
        (lambda: Margin(right_from=0), r"margin\.right_from: expected a mark in \(0, 1\]"),
        (lambda: MarginShift(direction="up"), r"advantage\.direction: expected one of spread, lift, lower"),
        (lambda: MarginMask(least_kept=0), r"advantage\.least_kept: expected a number in \(0, 1\]"),
    ],
)
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()
