"""The push of the teacher against that of the expected reward (arXiv 2605.10889), at single tokens."""

import math

import pytest
import torch
from conftest import make_tokenizer
from rollouts_by_hand import compared, make_rollout
from toys import LetterTask

from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.diagnosis.alignment import (
    Forcing,
    Node,
    alignment,
    draw_positions,
    logit_gradient,
    measure_alignment,
)
from opd_lightning.interfaces import Problem, Rollout, Sampling

TOKENIZER = HFTokenizer(make_tokenizer())


def random(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_ideal_gradient_is_that_of_the_expected_reward():
    logits, successes = random(6, 0).requires_grad_(), random(6, 1).sigmoid()
    (expected,) = torch.autograd.grad((logits.softmax(-1) * successes).sum(), logits)
    found = logit_gradient(logits.detach(), successes)
    torch.testing.assert_close(found, expected)
    assert float(found.sum()) == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(
        logit_gradient(logits.detach(), torch.ones(6)), torch.zeros(6).double(), atol=1e-15, rtol=0
    )


def test_distillation_descends_the_reverse_kl():
    logits, log_q = random(6, 2).requires_grad_(), random(6, 3).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)
    torch.testing.assert_close(logit_gradient(log_p.detach(), log_q - log_p.detach()), -gradient)


def test_a_perfect_teacher_has_cosine_1_and_its_opposite_minus_1():
    log_p, successes = random(5, 4).log_softmax(-1), random(5, 5).sigmoid()
    assert alignment(log_p, log_p + successes, successes) == pytest.approx(1)
    assert alignment(log_p, log_p - 3 * successes, successes) == pytest.approx(-1)
    assert math.isnan(alignment(log_p, log_p, successes))  # the teacher says nothing
    assert math.isnan(alignment(log_p, random(5, 6), torch.ones(5)))  # no token is better


def test_tokens_are_looked_at_where_the_student_has_a_choice():
    rollouts = [compared([1, 2, 3], student_entropy=[0.0, 1.0, 0.0]) for _ in range(3)]
    assert draw_positions(rollouts, 0) == [1, 1, 1]


def test_each_candidate_is_forced_and_the_answers_are_marked():
    problem = Problem("p", ({"role": "user", "content": "?"},), "a")
    ids = [int(TOKENIZER.encode(letter)[0]) for letter in "xyz"]
    stop = TOKENIZER.stop_ids[0]
    asked = []

    def generate(prompts, sampling):
        """A student that says a in every second answer after y, always after z, and never else."""
        (prompt,) = prompts
        asked.append((TOKENIZER.decode(prompt.token_ids), sampling.max_new_tokens, len(set(prompt.seeds))))
        last = TOKENIZER.decode(prompt.token_ids[-1:])
        says = ["a" if last == "z" or (last == "y" and i % 2) else "b" for i in range(len(prompt.seeds))]
        return [
            Rollout(
                problem, torch.tensor(prompt.token_ids), torch.tensor(TOKENIZER.encode(word)), torch.zeros(1), False, s
            )
            for s, word in zip(prompt.seeds, says, strict=True)
        ]

    rollout = make_rollout(TOKENIZER.encode("qxr"), 0.0, problem=problem, prompt=tuple(TOKENIZER.encode("?")))
    successes = torch.tensor([0.0, 0.5, 1.0, 0.0])
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    node = Node(rollout, 1, torch.tensor([*ids, stop]), log_p, log_p + 2 * successes)
    forcing = Forcing(generate, LetterTask(), TOKENIZER, Sampling(max_new_tokens=5), seed=0, num_continuations=4)
    found = measure_alignment([node], forcing)
    assert asked == [("?qx", 3, 4), ("?qy", 3, 4), ("?qz", 3, 4)]  # a closing token needs no continuation
    assert (found.num_nodes, found.num_informative, found.after_right) == (1, 1, None)
    assert found.cosine.value == found.after_wrong.value == pytest.approx(1)
