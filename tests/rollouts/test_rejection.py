import random

import pytest
import torch

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.rollouts.rejection import Rejection, is_repetitive


def make_rollout(text="fine", *, finished=True, reward=1.0, ids=(1, 2)):
    problem = Problem("a", ({"role": "user", "content": "?"},))
    response_ids = torch.tensor(ids)
    return Rollout(problem, torch.tensor([1]), response_ids, torch.zeros(len(ids)), finished, 0, text, reward)


def noise(length, seed=0):
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=length))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("this line has 20 chars\n" * 4, False),
        ("this line has 20 chars\n" * 5, True),
        ("  this line has 20 chars \n x \n" * 5, True),  # between others, and indented
        ("19 characters long.\n" * 5, False),  # 100 characters are one window
        (noise(100) * 2 + noise(50, 1), False),
        (noise(100) * 3, True),  # a window at 0, 100 and 200
        (noise(105) * 3, False),  # no multiple of the stride: windows differ
        (noise(50, 3) * 3 + noise(4850, 4), False),  # not longer than 5,000
        (noise(4951, 4) + noise(50, 3) * 3, True),
        (noise(4951, 4) + noise(50, 3) * 2 + "x" + noise(50, 3), False),
        ("", False),
    ],
)
def test_the_papers_rules_for_texts_that_run_in_circles(text, expected):
    assert is_repetitive(text) is expected


def test_the_first_reason_is_given():
    rules = Rejection(pattern=r"\\boxed\{", wrong=True)
    good = r"so \boxed{4}"
    assert rules.reason(make_rollout(good)) is None
    assert rules.reason(make_rollout(good, finished=False)) == "truncated"
    assert rules.reason(make_rollout("this line has 20 chars\n" * 5)) == "repetitive"
    assert rules.reason(make_rollout("so 4")) == "without pattern"
    assert rules.reason(make_rollout(good, reward=0.5)) == "wrong"
    assert rules.reason(make_rollout(good), {(1, 2)}) == "duplicate"
    assert rules.reason(make_rollout(good), {(1, 3)}) is None


def test_every_rule_can_be_switched_off():
    rules = Rejection(truncated=False, repetitive=False, duplicates=False)
    loops = make_rollout("this line has 20 chars\n" * 5, finished=False, reward=0.0)
    assert rules.reason(loops, {(1, 2)}) is None


def test_a_pattern_must_be_one():
    with pytest.raises(ValueError, match=r"reject\.pattern: expected a regular expression, got '\(\('"):
        Rejection(pattern="((")
