import random
import time
from collections import Counter

import pytest

from opd_lightning.interfaces import Problem
from opd_lightning.tasks.ledger import SIGNS, LedgerTask, book, draw_ledger, solve_ledger, split_ledger

PROBLEM = Problem(uid="p", messages=({"role": "user", "content": "16+23-19="},), answer="20")
LINES = "16+23=39;39-19=20;"
GOLDEN_UIDS = [
    "ledger/13+10+22+25-18-10-19+23+11+21-17-16-23",
    "ledger/18+21+23+20-18-22-17+16+11+13-14-16-25",
    "ledger/19+12+18+26-22-17-13+13+14+23-23-18-24",
    "ledger/12+26+14+12-15-22-23+20+13+10-11-26-25",
    "ledger/20+22+20+13-10-12-15+26+19+17-19-16-13",
]


@pytest.fixture(scope="module")
def task():
    return LedgerTask(num_train=1000, num_validation=100, num_test=100, levels=[1, 2])


def test_the_same_seed_draws_the_same_problems(task):
    again = LedgerTask(num_train=1000, num_validation=100, num_test=100, levels=[1, 2])
    for split in ("train", "validation", "test"):
        assert task.problems(split) == again.problems(split)
    assert task.problems("predict") == task.problems("test")
    other = LedgerTask(num_train=0, num_validation=100, num_test=100, levels=[1, 2], seed=1)
    assert task.problems("test") != other.problems("test")


def test_problems_are_the_ones_the_shipped_models_and_curves_were_made_with():
    first = LedgerTask(num_train=3, num_validation=1, num_test=1)
    assert [p.uid for split in ("train", "validation", "test") for p in first.problems(split)] == GOLDEN_UIDS


def test_more_training_problems_change_nothing_drawn_before(task):
    small = LedgerTask(num_train=100, num_validation=100, num_test=100, levels=[1, 2])
    assert small.problems("train") == task.problems("train")[:100]
    assert small.problems("validation") == task.problems("validation")
    assert small.problems("test") == task.problems("test")


def test_no_problem_is_met_twice_within_or_between_splits(task):
    problems = [problem for split in ("train", "validation", "test") for problem in task.problems(split)]
    assert len({p.uid for p in problems}) == len({p.messages[0]["content"] for p in problems}) == 1200


def test_ledgers_have_four_sections_and_no_entry_twice(task):
    problems = task.problems("train")
    assert Counter(p.columns["level"] for p in problems) == {1: 500, 2: 500}
    for problem in problems:
        _, entries = split_ledger(problem.messages[0]["content"].removesuffix("="))
        assert len(entries) == len(set(entries)) == 4 * (2 + problem.columns["level"])
        signs = "".join(entry[0] for entry in entries)
        assert signs == "".join(sign * (2 + problem.columns["level"]) for sign in SIGNS)


def test_reference_answers_agree_with_python(task):
    for problem in task.problems("train"):
        question = problem.messages[0]["content"]
        assert problem.answer == f"{eval(question[:-1]) % 100:02d}"
        for line in problem.columns["solution"].split(";")[:-1]:
            left, right = line.split("=")
            assert (int(left[:2]) + int(left[2:])) % 100 == int(right)


def test_solutions_have_the_stated_lengths_and_earn_the_point(task):
    lengths = {p.columns["level"]: len(p.columns["solution"]) + 1 for p in task.problems("train")}  # one more to close
    assert lengths == {1: 112, 2: 148}
    assert all(task.grade(problem, problem.columns["solution"]) == 1.0 for problem in task.problems("train"))


def test_booking_and_solving():
    assert [book(16, "+23"), book(98, "+23"), book(5, "-19")] == [39, 21, 86]
    assert solve_ledger("16+23-19") == LINES + "#20"
    assert draw_ledger(random.Random(0), 2) == draw_ledger(random.Random(0), 2)


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        (LINES + "#20", 1.0),
        ("16+23=00;#20", 1.0),  # only the final balance is marked
        (LINES + "#21", 0.0),
        (LINES + "#020", 0.0),
        (LINES + "#2", 0.0),
        (LINES + "#20;", 0.0),
        (LINES + "#20\n", 0.0),
        (LINES + "20", 0.0),
        (LINES + "#20#20", 0.0),
        (LINES, 0.0),
        ("#20", 0.0),
        ("", 0.0),
        (LINES + "#２０", 0.0),
        ("16*23=39;#20", 0.0),
        ("16+23=39,#20", 0.0),
        ("I think " + LINES + "#20", 0.0),
    ],
)
def test_grade(task, response, grade):
    assert task.grade(PROBLEM, response) == grade


@pytest.mark.parametrize("text", ["9", "16+23=39;", "#", ";#"])
def test_grading_endless_text_is_quick_and_worth_nothing(task, text):
    started = time.process_time()
    assert task.grade(PROBLEM, text * 1_000_000) == 0.0
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": -1}, "num_train: expected 0 or more problems, got -1"),
        ({"levels": []}, "levels: expected at least one level out of 1 to 2, got \\[\\]"),
        ({"levels": [0, 3]}, "levels: expected .* got \\[0, 3\\]"),
        ({"num_train": 600_000}, "expected at most 500000 problems, got 600512; ask for fewer"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LedgerTask(**settings)
