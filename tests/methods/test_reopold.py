"""REOPOLD (arXiv 2603.11137): a floor under the rewards in two readings, and a mask in two phases."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import make_case

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.methods import AboveFloorThenUncertain, Floor, RewardFloor
from opd_lightning.objectives import SampledTokenObjective
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.shaping import attach


def test_both_readings_of_the_floor():
    assert Floor(0.2).nats == pytest.approx(math.log(0.2) / 0.8)
    assert Floor(0.2, "odds").nats == pytest.approx(math.log(0.2 / 0.8))
    assert [round(Floor(0.2, reading).nats, 2) for reading in ("infimum", "odds")] == [-2.01, -1.39]
    assert Floor(value=-3.0).nats == -3.0


@pytest.mark.parametrize("mixture", [0.05, 0.2, 0.7, 0.95])
def test_the_first_reading_is_the_infimum_of_a_mixture_reward_with_slope_1(mixture):
    ratios = torch.tensor([-60.0, 0.0], dtype=torch.float64, requires_grad=True)
    rewards = (mixture + (1 - mixture) * ratios.exp()).log() / (1 - mixture)
    assert float(rewards.detach()[0]) == pytest.approx(Floor(mixture).nats)
    (slopes,) = torch.autograd.grad(rewards.sum(), ratios)
    assert float(slopes[1]) == pytest.approx(1)
    assert Floor(mixture).nats < -1  # negative for every share, and at least 1 below


def test_no_reward_lies_below_the_floor_and_without_a_floor_it_is_the_plain_policy_gradient():
    case = make_case(n=40)
    floored = SampledTokenObjective(advantage=RewardFloor(Floor(0.2)))
    shown = floored.advantages(case.logits, case.scores(), case.tokens)
    rewards = (case.q / case.p).log()[range(40), case.response_ids]
    torch.testing.assert_close(shown, rewards.clamp(min=Floor(0.2).nats))
    assert (rewards < Floor(0.2).nats).any()
    lowest = SampledTokenObjective(advantage=RewardFloor(Floor(1e-300)))
    torch.testing.assert_close(case.gradient(lowest), case.gradient(SampledTokenObjective()), rtol=0, atol=0)


def batch_of(lengths, step):
    def rollout(seed, length):
        ids = torch.arange(length)
        return Rollout(Problem("a", ()), torch.tensor([1]), ids, torch.zeros(length), True, seed=seed)

    rollouts = [rollout(seed, length) for seed, length in enumerate(lengths)]
    return collate([attach(each, step=torch.full((len(each.response_ids),), float(step))) for each in rollouts], 0)


def test_the_mask_changes_at_its_step():
    mask = AboveFloorThenUncertain(switch_step=10, share=0.5, floor=Floor(value=-1.0))
    facts = {
        "sampled_log_ratio": torch.tensor([0.5, 1.0, 1.5, -3.0, 0.0]),  # rewards are its negative
        "student_entropy": torch.tensor([0.3, 0.1, 0.2, 0.4, 0.5]),
    }
    assert mask(facts, batch_of([3, 2], step=9)).tolist() == [1, 0, 0, 1, 1]
    assert mask(facts, batch_of([3, 2], step=10)).tolist() == [1, 0, 0, 0, 1]  # the floor of half of each, one at least
    assert AboveFloorThenUncertain(0, share=1.0)(facts, batch_of([3, 2], step=0)).tolist() == [1] * 5
    assert mask.normalizer == "kept_tokens"


def test_no_tokens():
    mask, batch = AboveFloorThenUncertain(switch_step=0), batch_of([1], step=0)
    empty = replace(batch.rollouts[0], student_wrote=torch.zeros(1, dtype=torch.bool))
    nothing = {"sampled_log_ratio": torch.zeros(0), "student_entropy": torch.zeros(0)}
    assert mask(nothing, collate([empty], 0)).numel() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Floor(1.0), r"floor\.mixture: expected a number between 0 and 1"),
        (lambda: Floor(0.6, "odds"), r"floor: 0\.405\d+ nats would raise the reward"),
        (lambda: Floor(reading="mean"), r"floor\.reading: expected one of infimum, odds"),
        (lambda: AboveFloorThenUncertain(-1), r"token_weighting\.switch_step: expected an integer of at least 0"),
        (lambda: AboveFloorThenUncertain(1, share=0), r"token_weighting\.share: expected a number in \(0, 1\]"),
    ],
)
def test_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
