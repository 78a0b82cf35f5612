"""One line for every mistake in a task of the user's own, and it names the class."""

import math
import re

import pytest
import torch

from opd_lightning.interfaces import Problem, Rollout, Task
from opd_lightning.rollouts.answering import grade
from opd_lightning.rollouts.task_checks import check_problems

ASKED = ({"role": "user", "content": "1+1?"},)
GOOD = [Problem("a", ASKED, "2"), Problem("b", ASKED, "2")]


class Prompts(Task):
    def __init__(self, problems=GOOD):
        self.given = problems

    def problems(self, split):
        return self.given


class Sums(Prompts):
    def __init__(self, problems=GOOD, grades=0.0):
        super().__init__(problems)
        self.grades = grades

    def grade(self, problem, response):
        return self.grades


class SumsByRollout(Prompts):
    def __init__(self, grades):
        super().__init__()
        self.grades = grades

    def grade_rollouts(self, rollouts):
        return self.grades(rollouts)


def rollout(problem, text="2"):
    ids = torch.tensor([1])
    return Rollout(problem, ids, ids, torch.zeros(1), True, 0, text)


ROLLOUTS = [rollout(problem) for problem in GOOD]


def test_a_task_is_graded_when_it_marks_something():
    assert Sums().is_graded
    assert SumsByRollout(None).is_graded
    assert not Prompts().is_graded


def test_good_problems_pass_as_a_list():
    assert check_problems(Sums(), "train") == GOOD
    assert check_problems(Sums(tuple(GOOD)), "train") == GOOD
    unanswered = [Problem("a", ASKED), Problem("b", ({"role": "raw", "content": "1+1="},), "2")]
    assert check_problems(Prompts(unanswered), "train") == unanswered


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (
            (problem for problem in GOOD),
            r"\('train'\): expected a list of Problem, got .* \(generator\)\. Return a list",
        ),
        (None, r"\('train'\): expected a list of Problem, got None \(NoneType\)"),
        ({"a": GOOD[0]}, r"expected a list of Problem, got .*\(dict\)"),
        (["1+1?"], r"\[0\]: expected a Problem, got '1\+1\?' \(str\)"),
        ([GOOD[0], GOOD[0]], r"\[1\]\.uid: 'a' is also the uid of problem 0\. Give every problem of a split its own"),
        ([Problem(7, ASKED, "2")], r"\[0\]\.uid: expected a name, got 7 \(int\)"),
        ([Problem("a", "1+1?", "2")], r"\[0\]\.messages: expected chat messages such as .* got '1\+1\?' \(str\)"),
        ([Problem("a", (), "2")], r"\[0\]\.messages: expected chat messages .* got \(\) \(tuple\)"),
        ([Problem("a", ("1+1?",), "2")], r"\.messages: expected messages with a role and a content, .* got '1\+1\?'"),
        ([Problem("a", ({"role": "user"},), "2")], r"\.messages: expected messages with a role and a content"),
        (
            [Problem("a", (*ASKED, {"role": "raw", "content": "x"}), "2")],
            r"role 'raw' is the whole prompt; .* only one",
        ),
        (
            [Problem("a", ASKED, None)],
            r"\[0\]\.answer is None, but the task marks answers\. Give the reference as text",
        ),
        ([Problem("a", ASKED, 2)], r"\[0\]\.answer: expected text, got 2 \(int\)"),
    ],
)
def test_bad_problems(problems, message):
    with pytest.raises(ValueError, match=r"data\.task: Sums\.problems" + ".*" + message) as error:
        check_problems(Sums(problems), "train")
    assert "\n" not in str(error.value)


def test_no_problems():
    with pytest.raises(ValueError, match=r"data\.task: Sums has no problems in its 'validation' split\. .*limit_val"):
        check_problems(Sums([]), "validation")


def test_rewards_of_a_task_without_answers_stay_nan():
    graded = grade(Prompts(), ROLLOUTS)
    assert [math.isnan(rollout.reward) for rollout in graded] == [True, True]


@pytest.mark.parametrize("value", [1, True, 1.0, torch.tensor(1.0), torch.tensor(1)])
def test_whatever_is_a_number_is_a_grade(value):
    rewards = [rollout.reward for rollout in grade(Sums(grades=value), ROLLOUTS)]
    assert rewards == [1.0, 1.0]
    assert all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -0.1, 1.5, "1", [1.0], torch.ones(2)])
def test_bad_grades(value):
    expected = r"data\.task: Sums\.grade: expected a number from 0 \(wrong\) to 1 \(right\) .* problem 'a', got "
    with pytest.raises(ValueError, match=expected + re.escape(repr(value)[:5])) as error:
        grade(Sums(grades=value), ROLLOUTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("grades", "came"),
    [
        (lambda rollouts: (1.0 for _ in rollouts), r"<generator .*\(generator\)"),
        (lambda rollouts: [1.0], "1"),
        (lambda rollouts: None, r"None \(NoneType\)"),
        (lambda rollouts: 1.0, r"1\.0 \(float\)"),
    ],
)
def test_bad_lists_of_grades(grades, came):
    message = rf"SumsByRollout\.grade_rollouts: expected a list of 2 grades, one for each rollout, got {came}\."
    with pytest.raises(ValueError, match=message):
        grade(SumsByRollout(grades), ROLLOUTS)


def test_grade_rollouts_sees_tokens_and_whether_they_finished():
    task = SumsByRollout(lambda rollouts: [float(r.finished and r.response_ids.tolist() == [1]) for r in rollouts])
    assert [rollout.reward for rollout in grade(task, ROLLOUTS)] == [1.0, 1.0]
