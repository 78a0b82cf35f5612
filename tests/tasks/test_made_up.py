import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.tasks import ArithmeticTask, LedgerTask

SPLITS = ("train", "validation", "test")
ALL_LEVELS = {ArithmeticTask: (1, 2, 3, 4), LedgerTask: (1, 2)}
GOLDEN_UIDS = {
    ArithmeticTask: [
        "arithmetic/10*8-34",
        "arithmetic/11*9-66+56",
        "arithmetic/63-53+33-18+9",
        "arithmetic/90+3-29",
        "arithmetic/58-50+58",
    ],
    LedgerTask: [
        "ledger/13+10+22+25-18-10-19+23+11+21-17-16-23",
        "ledger/18+21+23+20-18-22-17+16+11+13-14-16-25",
        "ledger/19+12+18+26-22-17-13+13+14+23-23-18-24",
        "ledger/12+26+14+12-15-22-23+20+13+10-11-26-25",
        "ledger/20+22+20+13-10-12-15+26+19+17-19-16-13",
    ],
}


def make(kind, num_train=500, seed=0):
    return kind(num_train=num_train, num_validation=50, num_test=50, levels=ALL_LEVELS[kind], seed=seed)


@pytest.fixture(scope="module", params=ALL_LEVELS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def task(kind):
    return make(kind)


def test_the_same_seed_draws_the_same_problems(kind, task):
    assert all(task.problems(split) == make(kind).problems(split) for split in SPLITS)
    assert task.problems("predict") == task.problems("test")
    assert task.problems("test") != make(kind, seed=1).problems("test")


def test_problems_are_the_ones_the_shipped_models_and_curves_were_made_with(kind):
    first = kind(num_train=3, num_validation=1, num_test=1)
    assert [p.uid for split in SPLITS for p in first.problems(split)] == GOLDEN_UIDS[kind]


def test_more_training_problems_change_nothing_drawn_before(kind, task):
    small = make(kind, num_train=100)
    assert small.problems("train") == task.problems("train")[:100]
    assert small.problems("validation") == task.problems("validation")
    assert small.problems("test") == task.problems("test")


def test_no_problem_is_met_twice_within_or_between_splits(task):
    problems = [problem for split in SPLITS for problem in task.problems(split)]
    assert len({p.uid for p in problems}) == len({p.messages[0]["content"] for p in problems}) == 600


def test_levels_are_dealt_out_in_turn_and_may_be_chosen(kind, task):
    levels = ALL_LEVELS[kind]
    assert [p.columns["level"] for p in task.problems("train")] == list(levels) * (500 // len(levels))
    chosen = kind(num_train=10, num_validation=0, num_test=0, levels=[2, 1]).problems("train")
    assert [p.columns["level"] for p in chosen] == [2, 1] * 5


def test_the_written_solution_earns_the_point(task):
    for problem in task.problems("train"):
        assert problem.messages[0]["content"].endswith("=")
        assert task.grade(problem, problem.columns["solution"]) == 1.0


@pytest.mark.parametrize("text", ["9", "1+1=2;", "16+23=39;", "1+1", "#", "-", ";#"])
def test_grading_endless_text_is_quick_and_worth_nothing(task, text):
    started = time.process_time()
    assert task.grade(task.problems("test")[0], text * 1_000_000) == 0.0
    assert time.process_time() - started < 1.0


@given(text=st.text())
def test_grading_never_fails(task, text):
    assert task.grade(task.problems("test")[0], text) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": -1}, "num_train: expected 0 or more problems, got -1"),
        ({"num_test": -5}, "num_test: expected 0 or more"),
        ({"levels": []}, "levels: expected at least one level out of 1 to {num_levels}, got \\[\\]"),
        ({"levels": [0, 1]}, "levels: expected .* got \\[0, 1\\]"),
        ({"levels": [5]}, "levels: expected"),
        ({"num_train": 600_000}, "expected at most {most} problems, got 600512; ask for fewer"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message.format(num_levels=kind.num_levels, most=kind.most)):
        kind(**settings)
