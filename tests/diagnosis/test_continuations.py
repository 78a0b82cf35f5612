"""The teacher goes on where the student was cut; the marks of both are compared on the same answers."""

import pytest
import torch
from conftest import make_tokenizer
from rollouts_by_hand import make_rollout
from toys import LetterTask

from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.diagnosis.continuations import compare_answers, continue_answers, depths_of
from opd_lightning.interfaces import Problem, Rollout, Sampling

TOKENIZER = HFTokenizer(make_tokenizer())
PROBLEMS = [Problem(letter, ({"role": "user", "content": letter},), letter) for letter in "ab"]


def answered(problem, text, seed):
    ids = TOKENIZER.encode(text)
    return make_rollout(
        ids, float(problem.answer in text), problem=problem, seed=seed, prompt=tuple(TOKENIZER.encode("?"))
    )


def test_depths_are_shares_of_the_longest_answer():
    assert depths_of([make_rollout([1] * 40), make_rollout([1] * 3)]) == [5, 10, 20, 30]
    assert depths_of([make_rollout([1] * 4)]) == [1, 2, 3]
    assert depths_of([make_rollout([1])]) == []


def test_the_same_answers_are_marked_on_both_sides():
    asked = []

    def generate(prompts, sampling):
        """A teacher that always says a."""
        asked.extend((TOKENIZER.decode(prompt.token_ids), sampling.max_new_tokens) for prompt in prompts)
        ids = torch.tensor(TOKENIZER.encode("a"))
        return [
            Rollout(p.problem, torch.tensor(p.token_ids), ids, torch.zeros(1), False, p.seeds[0], "a") for p in prompts
        ]

    groups = [
        [answered(PROBLEMS[0], "xyz", 1), answered(PROBLEMS[0], "za", 2)],
        [answered(PROBLEMS[1], "bxx", 3), answered(PROBLEMS[1], "xxb", 4)],
    ]
    found = continue_answers(
        groups, 2, generate, task=LetterTask(), tokenizer=TOKENIZER, sampling=Sampling(max_new_tokens=9), seed=0
    )
    assert asked == [("?xy", 7), ("?bx", 7), ("?xx", 7)]  # "za" has no third token
    # student: wrong, right, right; teacher: xya right, bxa right (the student's own b), xxa wrong
    assert (found.depth, found.num_rollouts, found.student) == (2, 3, pytest.approx(2 / 3))
    assert found.teacher == pytest.approx(2 / 3) and found.gain.value == pytest.approx(0)
    # deviations of the prompts are +1 and -1: sqrt(2 / 1 * 2) / 3
    assert found.gain.error == pytest.approx(2 / 3)


def test_depth_0_compares_two_sets_of_answers():
    student = [[make_rollout([1], 0.0), make_rollout([1], 1.0)], [make_rollout([1], 0.0), make_rollout([1], 0.0)]]
    teacher = [[make_rollout([1], 1.0), make_rollout([1], 1.0)], [make_rollout([1], 1.0), make_rollout([1], 0.0)]]
    found = compare_answers(student, teacher)
    assert (found.depth, found.student, found.teacher, found.gain.value) == (0, 0.25, 0.75, 0.5)
