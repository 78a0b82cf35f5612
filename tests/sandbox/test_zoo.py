import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.sandbox import make as make_module
from opd_lightning.sandbox import make_zoo
from opd_lightning.sandbox.make_zoo import RECIPES, Lessons, Recipe, make
from opd_lightning.sandbox.notations import NotationTask, expression_of, solve_otherwise
from opd_lightning.tasks.arithmetic import ArithmeticTask, solve

TASK = NotationTask(num_train=40, num_validation=10, num_test=10)


def test_the_problems_are_those_of_the_sandbox_in_either_template():
    usual = ArithmeticTask(num_train=40, num_validation=10, num_test=10)
    question = NotationTask("question", num_train=40, num_validation=10, num_test=10)
    for split in ("train", "validation", "test", "predict"):
        assert TASK.problems(split) == usual.problems(split)
        for asked, problem in zip(question.problems(split), usual.problems(split), strict=True):
            assert asked.messages[0]["content"] == f"Q: {expression_of(problem)}?"
            assert (asked.uid, asked.answer) == (problem.uid, problem.answer)


def test_every_notation_is_marked_by_its_last_number():
    for problem in TASK.problems("train"):
        expression = expression_of(problem)
        for solution in (solve(expression), solve_otherwise(expression), f"#{problem.answer}"):
            assert TASK.grade(problem, solution) == 1
        for wrong in (f"{solve(expression)}0", f"{solve(expression)} ", problem.answer, ""):
            assert TASK.grade(problem, wrong) == 0


def test_the_other_notation_has_other_signs_in_its_steps():
    assert solve_otherwise("17+25-8") == "17p25>42,42m8>34,#34"


def test_unknown_templates_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="template: expected one of plain, question, got 'chat'"):
        NotationTask("chat")
    with pytest.raises(ValueError, match=r"names: expected models out of other-notation, .*, got 'owl'"):
        make(tmp_path, names=("owl",))
    assert not list(tmp_path.iterdir())


def test_a_model_comes_from_the_sandbox_or_from_one_before_it():
    known = {"student", "teacher"}
    for name, recipe in RECIPES.items():
        assert recipe.start in known
        known.add(name)
    assert all(name in make_zoo.__doc__ for name in RECIPES)


def test_lessons_leave_held_out_sums_alone_and_use_every_template():
    write = Lessons(1, templates=("plain", "question")).writer(set(), random.Random(0))
    questions = [write()[0] for _ in range(20)]
    assert {question[:3] == "Q: " for question in questions} == {True, False}
    held_out = {question.strip("Q: =?") for question in questions}
    write = Lessons(1, is_otherwise=True).writer(held_out, random.Random(0))
    for question, answer in (write() for _ in range(20)):
        assert question[:-1] not in held_out
        assert answer == solve_otherwise(question[:-1])


def test_models_are_made_once_with_those_that_they_come_from(tmp_path, monkeypatch):
    recipes = {
        "parent": Recipe((Lessons(1),), "student", layers=(0, 3)),
        "child": Recipe((Lessons(1, templates=("question",)),), "parent", noise=0.1),
    }
    monkeypatch.setattr(make_zoo, "RECIPES", recipes)
    monkeypatch.setattr(make_module, "BATCH_SIZE", 4)
    make(tmp_path, names=("child",), num_problems=2)
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "child"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "child").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "child")("=")["input_ids"]
    assert "plain 0.0%, question 0.0%" in (tmp_path / "child" / "README.md").read_text()
    card = tmp_path / "parent" / "README.md"
    card.write_text("left alone")
    make(tmp_path, names=("parent", "child"))
    assert card.read_text() == "left alone"
