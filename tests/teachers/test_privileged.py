"""Teachers that read more than the student: the prompt is theirs, the answer's tokens stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scoring import CPU, EVERYTHING, make_batches, reference

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.interfaces import Problem
from opd_lightning.rollouts.batching import collate
from opd_lightning.teachers import PrivilegedTeacher

TEMPLATE = "{question} hint: {solution}"


@pytest.fixture
def student(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder))


def rollouts(student, *columns):
    """Rollouts of problems with these columns; prompts as the student reads them."""
    _, (group,) = make_batches()
    found = []
    for rollout, mine in zip(group, columns, strict=False):
        messages = ({"role": "system", "content": "be good"}, {"role": "user", "content": f"1+{len(found)}=?"})
        problem = Problem(f"u{len(found)}", messages, answer="1", columns=mine)
        prompt_ids = torch.tensor(student.tokenizer.render(messages))
        found.append(replace(rollout, problem=problem, prompt_ids=prompt_ids))
    return found


def ready(student, template=TEMPLATE, **options):
    teacher = PrivilegedTeacher(HFTeacher(student.path), template, **options)
    teacher.preflight(student)
    teacher.setup(student, torch.nn.Identity(), CPU)
    return teacher


def test_the_answer_is_scored_behind_the_teachers_prompt(student):
    group = rollouts(student, {"solution": "1"}, {"solution": "2+0"}, {"solution": "x"})
    batch = collate(group, 0)
    scores = next(ready(student).score_all([batch], EVERYTHING))
    told = []
    for rollout, hint in zip(group, ("1", "2+0", "x"), strict=True):
        system, question = rollout.problem.messages
        message = {"role": "user", "content": f"{question['content']} hint: {hint}"}
        told.append(replace(rollout, prompt_ids=torch.tensor(student.tokenizer.render([system, message]))))
    assert torch.equal(scores.response_ids, batch.tokens.ids)  # no token of any prompt is scored
    expected = reference(student.path, told)
    torch.testing.assert_close(scores.full().double(), expected, atol=1e-4, rtol=1e-4)
    assert not scores.full().requires_grad
    assert (expected - reference(student.path, group)).abs().max() > 0.1


def test_without_privilege_it_is_the_teacher_bit_for_bit(student):
    batch = collate(rollouts(student, {}, {"solution": "2"}), 0)
    plain = ready(student).teacher
    for teacher in (ready(student, "{question}"), ready(student, "{question}{nothing}", missing="plain")):
        assert torch.equal(teacher.score(batch, EVERYTHING).full(), plain.score(batch, EVERYTHING).full())


def test_what_a_rollout_brings_comes_before_the_columns_of_its_problem(student):
    problem = rollouts(student, {"solution": "old", "meta": {"hint": "h"}})[0].problem
    teacher = PrivilegedTeacher(HFTeacher(student.path), "{question}|{answer}|{meta.hint}|{solution}|{x^2}")
    assert teacher.message(problem, {"solution": "new"}) == "1+0=?|1|h|new|{x^2}"


def test_problems_that_lack_what_it_reads_are_found_before_training(student):
    problems = [rollout.problem for rollout in rollouts(student, {"solution": "1"}, {"hint": "2"})]
    found = r"problem 'u1' has nothing to put for \{solution\}\. It has answer, hint, question\. .*missing: plain"
    with pytest.raises(ValueError, match=found):
        ready(student).check_problems(problems)
    ready(student, missing="plain").check_problems(problems)
    with pytest.warns(UserWarning, match=r"no problem has all of question, solution, so the teacher reads what"):
        ready(student, missing="plain").check_problems(problems[1:])
    with pytest.raises(ValueError, match=r"template: with it the prompt of problem 'u0' has 1\d\d tokens"):
        ready(student).score(collate(rollouts(student, {"solution": 100 * "1"}), 0), EVERYTHING)
    with pytest.raises(ValueError, match=r"template: expected names in braces"):
        ready(student, "a hint")
    with pytest.raises(ValueError, match=r"missing: expected one of refuse, plain, got 'skip'"):
        ready(student, missing="skip")
