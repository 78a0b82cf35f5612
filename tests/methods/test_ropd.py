"""ROPD (arXiv 2605.07396): marks by weighted criteria, less the group's mean, push all tokens of an answer alike."""

from dataclasses import replace

import pytest
import torch
from objective_cases import make_case
from scoring import make_batches

from opd_lightning.methods import Judge, RubricObjective
from opd_lightning.methods.ropd import rubric_score
from opd_lightning.objectives import Clipped
from opd_lightning.rollouts.shaping import shape_groups


class Table(Judge):
    def __init__(self, *marks):
        self.marks = marks

    def scores(self, groups):
        return [list(self.marks[: len(group)]) for group in groups]


def test_a_score_is_the_share_of_the_weight_that_is_met():
    weights = [1.0, 3.0, 6.0]
    assert rubric_score(weights, [0, 0, 0]) == 0
    assert rubric_score(weights, [1, 0, 1]) == pytest.approx(0.7)
    assert 0.999 < rubric_score(weights, [1, 1, 1]) <= 1
    assert rubric_score([7 * weight for weight in weights], [1, 0, 1]) == pytest.approx(0.7)


@pytest.mark.parametrize("mark", [1.1, -0.1, float("nan")])
def test_marks_are_from_0_to_1(mark):
    _, (rollouts,) = make_batches()
    rollouts = [replace(rollout, seed=i) for i, rollout in enumerate(rollouts[:2])]
    with pytest.raises(ValueError, match=r"objective.judge: expected marks from 0 to 1"):
        shape_groups(RubricObjective(Table(0.5, mark)), rollouts, 2)


def test_every_token_of_a_rollout_has_the_advantage_of_the_rollout():
    _, (rollouts,) = make_batches()
    rollouts = [replace(rollout, seed=i) for i, rollout in enumerate([*rollouts, *rollouts[:1]])]
    shaped = shape_groups(RubricObjective(Table(1.0, 0.5)), rollouts, 2)
    for rollout, advantage in zip(shaped, [0.25, -0.25, 0.25, -0.25], strict=True):
        assert rollout.extras["group_advantage"].tolist() == [advantage] * len(rollout.response_ids)
    with pytest.raises(ValueError, match=r"Set data.rollouts_per_prompt to 2 or more"):
        shape_groups(RubricObjective(Table(1.0)), rollouts, 1)


@pytest.mark.parametrize("importance", [None, Clipped()], ids=repr)
def test_the_gradient_is_that_of_the_advantage_times_the_log_probability(importance):
    case = make_case()
    drawn = case.p.log().gather(-1, case.response_ids[:, None]).squeeze(-1)
    advantages = torch.tensor([0.5, -0.5, 0.25, 0.0], dtype=torch.float64)
    objective = RubricObjective(Table(), importance=importance)
    assert objective.request() is None and objective.needs_rollout_log_probs == (importance is not None)
    tokens = replace(case.tokens, rollout_log_probs=drawn, extras={"group_advantage": advantages})
    logits = case.logits.clone().requires_grad_()
    objective.token_losses(logits, None, tokens).sum().backward()
    one_hot = torch.nn.functional.one_hot(case.response_ids, case.p.shape[-1])
    torch.testing.assert_close(logits.grad, -advantages[:, None] * (one_hot - case.p))


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"objective.judge"):
        RubricObjective("teacher")
