import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.interfaces import Problem
from opd_lightning.tasks.arithmetic import ArithmeticTask, calculate, draw_expression, solve, split_expression

PROBLEM = Problem(uid="p", messages=({"role": "user", "content": "17+25-8="},), answer="34")
STEPS = "17+25=42;42-8=34;"
GOLDEN_UIDS = [
    "arithmetic/10*8-34",
    "arithmetic/11*9-66+56",
    "arithmetic/63-53+33-18+9",
    "arithmetic/90+3-29",
    "arithmetic/58-50+58",
]


@pytest.fixture(scope="module")
def task():
    return ArithmeticTask(num_train=2000, num_validation=200, num_test=200)


def test_the_same_seed_draws_the_same_problems(task):
    again = ArithmeticTask(num_train=2000, num_validation=200, num_test=200)
    for split in ("train", "validation", "test"):
        assert task.problems(split) == again.problems(split)
    other = ArithmeticTask(num_train=0, num_validation=200, num_test=200, seed=1)
    assert task.problems("test") != other.problems("test")


def test_problems_are_the_ones_the_shipped_models_and_curves_were_made_with():
    first = ArithmeticTask(num_train=3, num_validation=1, num_test=1)
    assert [p.uid for split in ("train", "validation", "test") for p in first.problems(split)] == GOLDEN_UIDS


def test_more_training_problems_change_nothing_drawn_before(task):
    small = ArithmeticTask(num_train=100, num_validation=200, num_test=200)
    assert small.problems("train") == task.problems("train")[:100]
    assert small.problems("validation") == task.problems("validation")
    assert small.problems("test") == task.problems("test")


def test_no_problem_is_met_twice_within_or_between_splits(task):
    uids = [problem.uid for split in ("train", "validation", "test") for problem in task.problems(split)]
    questions = [p.messages[0]["content"] for split in ("train", "validation", "test") for p in task.problems(split)]
    assert len(uids) == len(set(uids)) == len(set(questions)) == 2400


def test_predict_answers_the_test_problems(task):
    assert task.problems("predict") == task.problems("test")


def test_levels_are_dealt_out_in_turn_and_have_level_plus_one_operations(task):
    problems = task.problems("train")
    assert Counter(p.columns["level"] for p in problems) == dict.fromkeys((1, 2, 3, 4), 500)
    for problem in problems:
        question = problem.messages[0]["content"]
        assert sum(question.count(sign) for sign in "+-*") == problem.columns["level"] + 1
        assert problem.columns["solution"].count(";") == problem.columns["level"] + 1


def test_chosen_levels_only():
    problems = ArithmeticTask(num_train=10, num_validation=0, num_test=0, levels=[3, 1]).problems("train")
    assert [p.columns["level"] for p in problems] == [3, 1] * 5


def test_reference_answers_agree_with_python(task):
    for problem in task.problems("train"):
        question = problem.messages[0]["content"]
        assert question.endswith("=")
        assert problem.answer == str(eval(question[:-1]))
        for step in problem.columns["solution"].split(";")[:-1]:
            left, right = step.split("=")
            assert eval(left) == int(right)
            assert 0 <= int(right) <= 99


def test_worked_solutions_take_16_to_64_tokens_and_earn_the_point(task):
    lengths = [len(problem.columns["solution"]) + 1 for problem in task.problems("train")]  # one more to close the turn
    assert min(lengths) >= 16
    assert max(lengths) <= 49
    assert all(task.grade(problem, problem.columns["solution"]) == 1.0 for problem in task.problems("train"))


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


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (STEPS + "#34", 1.0),
        ("17+25=32;32-8=24;#34", 1.0),  # only the final number is marked
        (STEPS + "#33", 0.0),
        (STEPS + "#034", 0.0),
        (STEPS + "#+34", 0.0),
        (STEPS + "#34.0", 0.0),
        (STEPS + "#34;", 0.0),
        (STEPS + "#34 ", 0.0),
        (STEPS + "#34\n", 0.0),
        (STEPS + "#3", 0.0),
        (STEPS + "#", 0.0),
        (STEPS + "34", 0.0),
        (STEPS + "#33#34", 0.0),
        (STEPS + "#34#34", 0.0),
        (STEPS + "# 34", 0.0),
        (STEPS, 0.0),
        ("#34", 0.0),
        ("34", 0.0),
        ("", 0.0),
        (STEPS + "#\u0663\u0664", 0.0),  # Arabic-Indic digits
        (STEPS + "#３４", 0.0),
        ("17+25=42,42-8=34,#34", 0.0),
        ("17 + 25 = 42; 42 - 8 = 34; #34", 0.0),
        ("I think " + STEPS + "#34", 0.0),
        ("\x00" + STEPS + "#34", 0.0),
        ("9**9**9**9;#34", 0.0),
        ("__import__('os').system('true');#34", 0.0),
    ],
)
def test_grade(task, response, grade):
    assert task.grade(PROBLEM, response) == grade


@pytest.mark.parametrize("text", ["9", "1+1=2;", "1+1", "#", "-", ";#"])
def test_grading_endless_text_is_quick_and_worth_nothing(task, text):
    started = time.perf_counter()
    assert task.grade(PROBLEM, text * 1_000_000) == 0.0
    assert time.perf_counter() - started < 1.0


@given(st.text())
def test_grading_never_fails(text):
    assert ArithmeticTask(0, 0, 0).grade(PROBLEM, text) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": -1}, "num_train: expected 0 or more problems, got -1"),
        ({"num_test": -5}, "num_test: expected 0 or more"),
        ({"levels": []}, "levels: expected at least one level out of 1 to 4, got \\[\\]"),
        ({"levels": [0, 1]}, "levels: expected .* got \\[0, 1\\]"),
        ({"levels": [5]}, "levels: expected"),
        ({"num_train": 60_000}, "expected at most 50000 problems, got 60512; ask for fewer"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticTask(**settings)
