import json

import pytest

from opd_lightning.interfaces import Problem, Task
from opd_lightning.tasks import CleanedTask

INSTRUCTION = "Please reason step by step and put your final answer at the end."
LONG = (
    "A farmer has twelve sheep and buys nine more at the market on Monday before he sells four of them to his brother"
)


class Farm(Task):
    def __init__(self, train, validation=("What is two plus two?",), test=()):
        self.questions = {"train": train, "validation": validation, "test": test}

    def problems(self, split):
        return [
            Problem(f"{split}/{i}", ({"role": "user", "content": f"{question} {INSTRUCTION}"},), "1")
            for i, question in enumerate(self.questions[split])
        ]

    def grade(self, problem, response):
        return 0.25


def fillers(count):
    return [f"How tall is tower {i} of castle {i * 7} beside river {i * 13} in year {1000 + i}?" for i in range(count)]


def test_questions_of_held_out_splits_are_left_out_and_reported(tmp_path):
    train = [*fillers(6), f"{LONG}.", "what is TWO plus two?", f"{LONG} now."]
    report = tmp_path / "deep" / "report.json"
    task = CleanedTask(Farm(train, test=(f"{LONG}!",)), near_duplicates=None, report=str(report))
    with pytest.warns(UserWarning, match="3 of 9 training questions are left out: 1 in validation, 2 in test"):
        left = task.problems("train")
    assert [problem.uid for problem in left] == [f"train/{i}" for i in range(6)]
    found = json.loads(report.read_text())
    assert found["train/7"] == {"reason": "in validation", "resembles": "validation/0"}
    assert found["train/6"]["resembles"] == found["train/8"]["resembles"] == "test/0"
    assert len(task.problems("test")) == 1  # benchmarks stay as they are


def test_near_duplicates_are_left_out_and_shared_instructions_do_not_count():
    pytest.importorskip("datasketch")
    train = [*fillers(80), f"{LONG}.", f"{LONG} today."]
    with pytest.warns(UserWarning, match="1 of 82 training questions are left out: 1 near duplicates"):
        left = CleanedTask(Farm(train)).problems("train")
    assert [problem.uid for problem in left] == [f"train/{i}" for i in range(81)]


def test_marking_is_that_of_the_inner_task():
    class Plain(Farm):
        grade = Task.grade

    task = CleanedTask(Farm(["a"]))
    assert task.is_graded and task.grade(task.problems("validation")[0], "x") == 0.25
    assert not CleanedTask(Plain(["a"])).is_graded


def test_mistakes():
    with pytest.raises(ValueError, match=r"task\.near_duplicates: expected a number in \(0, 1\]"):
        CleanedTask(Farm([]), near_duplicates=1.5)
    with pytest.raises(ValueError, match=r"task\.held_out: expected splits other than train"):
        CleanedTask(Farm([]), held_out=["train"])
    with (
        pytest.raises(ValueError, match="every one of the 1 training questions"),
        pytest.warns(UserWarning, match="left out"),
    ):
        CleanedTask(Farm(["What is two plus two?"]), near_duplicates=None).problems("train")
