import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.interfaces import Problem
from opd_lightning.tasks.arithmetic import ArithmeticTask, calculate, draw_expression, solve, split_expression

PROBLEM = Problem(uid="p", messages=({"role": "user", "content": "17+25-8="},), answer="34")
STEPS = "17+25=42;42-8=34;"


@pytest.fixture(scope="module")
def task():
    return ArithmeticTask(num_train=2000, num_validation=0, num_test=0)


def test_levels_are_dealt_out_in_turn_and_have_level_plus_one_operations(task):
    problems = task.problems("train")
    assert Counter(p.columns["level"] for p in problems) == dict.fromkeys((1, 2, 3, 4), 500)
    for problem in problems:
        question = problem.messages[0]["content"]
        assert sum(question.count(sign) for sign in "+-*") == problem.columns["level"] + 1
        assert problem.columns["solution"].count(";") == problem.columns["level"] + 1


def test_reference_answers_agree_with_python(task):
    for problem in task.problems("train"):
        question = problem.messages[0]["content"]
        assert question.endswith("=")
        assert problem.answer == str(eval(question[:-1]))
        for step in problem.columns["solution"].split(";")[:-1]:
            left, right = step.split("=")
            assert eval(left) == int(right)
            assert 0 <= int(right) <= 99


def test_worked_solutions_take_16_to_49_tokens(task):
    lengths = [len(problem.columns["solution"]) + 1 for problem in task.problems("train")]  # one more to close the turn
    assert min(lengths) >= 16
    assert max(lengths) <= 49


@given(seed=st.integers(0, 2**32), level=st.integers(1, 4))
def test_every_expression_stays_in_range_and_only_starts_with_a_product(seed, level):
    value, terms = split_expression(draw_expression(random.Random(seed), level))
    assert len(terms) == level + 1
    assert all(sign in "+-" for sign, _ in terms[1:])
    for sign, number in terms:
        value = calculate(value, sign, number)
        assert 0 <= value <= 99


def test_solve_shows_its_work():
    assert solve("17+25-8") == STEPS + "#34"
    assert solve("12*7-84") == "12*7=84;84-84=0;#0"
