"""Which problems a run works on."""

from dataclasses import replace

import pytest
from toys import LetterTask

from opd_lightning.rollouts.problem_sets import describe_problems, draw_problems, without_reserved


def test_another_data_set_of_the_same_size_is_told_apart():
    problems = LetterTask().problems("train")
    assert describe_problems(problems) == describe_problems(LetterTask().problems("train"))
    changed = [replace(problems[0], messages=({"role": "user", "content": "another question"},)), *problems[1:]]
    descriptions = {describe_problems(each) for each in (problems, changed, problems[::-1], problems[1:])}
    assert len(descriptions) == 4
    assert describe_problems(problems).startswith("12 problems")


def test_fewer_drawn_problems_are_the_first_of_more():
    problems = LetterTask().problems("train")
    assert draw_problems(problems, 3, seed=5) == draw_problems(problems, 7, seed=5)[:3]
    with pytest.raises(ValueError, match="13 prompts were asked for, but there are 12"):
        draw_problems(problems, 13, seed=5)


def test_reserved_problems_are_not_trained_on():
    problems = LetterTask().problems("train")
    assert without_reserved(problems, problems[:2]) == problems[2:]
    with pytest.raises(ValueError, match="num_reserved=12 leaves none of the 12"):
        without_reserved(problems, problems)
