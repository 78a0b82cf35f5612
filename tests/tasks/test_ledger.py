import random
from collections import Counter

import pytest

from opd_lightning.interfaces import Problem
from opd_lightning.tasks.ledger import SIGNS, LedgerTask, book, draw_ledger, solve_ledger, split_ledger

PROBLEM = Problem(uid="p", messages=({"role": "user", "content": "16+23-19="},), answer="20")
LINES = "16+23=39;39-19=20;"


@pytest.fixture(scope="module")
def task():
    return LedgerTask(num_train=1000, num_validation=0, num_test=0, levels=[1, 2])


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


def test_solutions_have_the_stated_lengths(task):
    lengths = {p.columns["level"]: len(p.columns["solution"]) + 1 for p in task.problems("train")}  # one more to close
    assert lengths == {1: 112, 2: 148}


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
