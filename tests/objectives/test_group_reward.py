"""A = c w (log q - log p) + b (r - mean) / deviation over the group of a prompt."""

from dataclasses import replace

import pytest
import torch
from objective_cases import make_case

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.objectives import GroupReward, SampledTokenObjective


def group(*rewards, length=3, **changes):
    problem = Problem("a", ({"role": "user", "content": "?"},), "")
    return [
        replace(
            Rollout(problem, torch.tensor([1]), torch.arange(length), torch.zeros(length), True, seed, reward=reward),
            **changes,
        )
        for seed, reward in enumerate(rewards)
    ]


def shaped(advantage, *groups):
    """The group's advantage of each rollout, the same for all of its tokens."""
    found = [
        rollout.extras["group_advantage"]
        for group in SampledTokenObjective(advantage=advantage).shape(groups)
        for rollout in group
    ]
    assert all(bool((values == values[0]).all()) and len(values) == 3 for values in found)
    return [float(values[0]) for values in found]


def test_marks_are_compared_within_the_group():
    found = shaped(GroupReward(), group(1.0, 0.0, 0.0, 1.0), group(0.0, 0.5))
    deviation = float(torch.tensor([1.0, 0, 0, 1]).std())
    assert found[:4] == pytest.approx([0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation])
    assert found[4:] == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert shaped(GroupReward(divide_by_deviation=False), group(1.0, 0.0)) == [0.5, -0.5]
    assert shaped(GroupReward(), group(1.0, 1.0, 1.0)) == [0, 0, 0]  # all alike: nothing to tell them apart


def test_what_was_attached_before_stays():
    ((rollout, _),) = GroupReward().shape([group(1.0, 0.0, extras={"other": torch.ones(3)})])
    assert rollout.extras.keys() == {"other", "group_advantage"}


def advantages(advantage, case, extras):
    tokens = replace(case.tokens, extras={name: torch.tensor(values) for name, values in extras.items()})
    return SampledTokenObjective(advantage=advantage).advantages(case.logits, case.scores(), tokens)


def test_the_parts_add_up_and_only_the_teachers_is_weighted_by_turns():
    case = make_case()
    plain = SampledTokenObjective().advantages(case.logits, case.scores(), case.tokens)
    marks, weights = [0.5, -0.5, 1.0, 0.0], [1.0, 0.5, 0.0, 1.0]
    found = advantages(GroupReward(2.0, 3.0), case, {"group_advantage": marks, "step_weight": weights})
    torch.testing.assert_close(found, 3 * torch.tensor(weights) * plain + 2 * torch.tensor(marks).double())
    torch.testing.assert_close(advantages(GroupReward(), case, {"group_advantage": [0.0] * 4}), plain)
    only = advantages(GroupReward(distillation=0.0), case, {"group_advantage": marks})
    torch.testing.assert_close(only, torch.tensor(marks).double())
    torch.testing.assert_close(advantages(GroupReward(), case, {}), plain)


def test_without_a_group_or_marks_it_says_what_to_set():
    with pytest.raises(ValueError, match=r"data\.rollouts_per_prompt: .*GroupReward compares .* Set it to 2 or more"):
        GroupReward().shape([group(1.0)])
    with pytest.raises(ValueError, match=r"GroupReward needs marked answers, but those to problem 'a' have no mark"):
        GroupReward().shape([group(1.0, float("nan"))])
    with pytest.raises(ValueError, match=r"advantage\.reward: expected a finite number of at least 0, got -1"):
        GroupReward(-1.0)
