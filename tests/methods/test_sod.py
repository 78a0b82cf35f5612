"""SOD (arXiv 2605.07725): w_1 = 1, w_k = min(prod_{u<k} (d_u + e) / (d_{u+1} + e), 1 + delta)."""

import math

import pytest
import torch
from weighed import trained, weigh

from opd_lightning.methods import StepWeights
from opd_lightning.objectives.group_reward import STEP_WEIGHT

OWN = [True] * 3 + [False] * 2 + [True] * 2 + [False] + [True] * 2 + [False]
LOG_RATIOS = [0.1, -0.2, 0.3, 1.0, -2.0, 0.05, -0.05]
TURNS = [(0, 3), (3, 5), (5, 7)]


def reference(slack):
    """The published product over turns."""
    distances = [sum(map(abs, LOG_RATIOS[a:b])) / (b - a) for a, b in TURNS]
    weights = []
    for k, (a, b) in enumerate(TURNS):
        product = math.prod((distances[u] + 1e-6) / (distances[u + 1] + 1e-6) for u in range(k))
        weights += [1.0 if k == 0 else min(product, 1 + slack)] * (b - a)
    return weights


@pytest.mark.parametrize("slack", [0.0, 0.2, 0.5, 10.0])
def test_the_closed_form_is_the_published_product(slack):
    response = trained({"sampled_log_ratio": LOG_RATIOS}, own=OWN)
    (weights,) = weigh(StepWeights(slack), response)
    assert weights == pytest.approx(reference(slack), rel=1e-5)


def test_one_turn_is_plain_distillation_and_so_are_turns_at_equal_distance():
    assert weigh(StepWeights(), trained({"sampled_log_ratio": [3.0, -1.0]})) == [[1, 1]]
    even = trained({"sampled_log_ratio": [0.5, -0.5, 0.5]}, own=[True, False, True, False, True])
    assert weigh(StepWeights(), even) == [[1, 1, 1]]
    silent = trained({"sampled_log_ratio": [0.0, 0.0]}, own=[True, False, True])
    assert weigh(StepWeights(), silent) == [[1, 1]]


def test_a_weight_knows_of_the_first_turn_and_its_own_only():
    own = [True, False, True, False, True]
    one, other = (trained({"sampled_log_ratio": [0.1, middle, 0.4]}, own=own) for middle in (0.2, 7.0))
    assert weigh(StepWeights(), one)[0][2] == weigh(StepWeights(), other)[0][2]


def test_with_rewards_the_weights_travel_with_the_tokens_of_the_student():
    response = trained({"sampled_log_ratio": LOG_RATIOS}, own=OWN)
    weighting = StepWeights(0.2, rewards=True)
    assert weighting.looks_first and not StepWeights(0.2).looks_first
    (rollout,) = weighting.look([response])
    noted = rollout.extras[STEP_WEIGHT]
    assert noted[torch.tensor(OWN)].tolist() == pytest.approx(reference(0.2), rel=1e-5)
    assert not noted[~torch.tensor(OWN)].any()
    assert weigh(weighting, response) == [[1] * 7]


def test_slack_is_not_negative():
    with pytest.raises(ValueError, match=r"token_weighting\.slack: expected a number of at least 0, got -0.1"):
        StepWeights(-0.1)
