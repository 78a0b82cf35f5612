"""MiniLLM (arXiv 2306.08543): the reverse KL of whole answers, its one-step part exactly."""

import itertools
from dataclasses import replace

import pytest
import torch
from objective_cases import make_case

from opd_lightning.interfaces import Problem, Rollout, ScoreRequest
from opd_lightning.methods import LongReturn
from opd_lightning.methods.minillm import returns_after
from opd_lightning.objectives import Clipped, DenseScores, DivergenceObjective, ForwardKL
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.shaping import attach


def test_returns_of_what_comes_after():
    ratios = torch.tensor([5.0, 1.0, 2.0, 4.0])
    assert returns_after(ratios, 1.0, length_normalized=False).tolist() == [7, 6, 4, 0]
    assert returns_after(ratios, 1.0, length_normalized=True).tolist() == pytest.approx([7 / 3, 3, 4, 0])
    assert returns_after(ratios, 0.5, length_normalized=False).tolist() == [1.5, 2, 2, 0]
    assert returns_after(ratios, 0.5, length_normalized=True).tolist() == pytest.approx([12 / 7, 8 / 3, 4, 0])
    assert returns_after(ratios, 0.0, length_normalized=True).tolist() == [0, 0, 0, 0]
    assert returns_after(torch.zeros(0), 1.0, length_normalized=True).tolist() == []


def whole_gradient(p_logits, q_logits):
    """Gradient of the reverse KL of whole answers of two binary tokens; logits [3, 2] of the states "", 0 and 1."""
    logits = p_logits.clone().requires_grad_()
    p, q = logits.log_softmax(-1), q_logits.log_softmax(-1)
    total = 0
    for first, second in itertools.product(range(2), repeat=2):
        log_p, log_q = p[0, first] + p[1 + first, second], q[0, first] + q[1 + first, second]
        total = total + log_p.exp() * (log_p - log_q)
    return torch.autograd.grad(total, logits)[0]


def expected_gradient(objective, p_logits, q_logits):
    """Of the objective, over all answers by their probability."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    total = torch.zeros_like(p_logits)
    for answer in itertools.product(range(2), repeat=2):
        states, ids = torch.tensor([0, 1 + answer[0]]), torch.tensor(answer)
        drawn = log_p[states, ids]
        rollout = Rollout(Problem("a", ()), torch.tensor([1]), ids, drawn, False, seed=0)
        [[shaped]] = objective.shape([[attach(rollout, log_ratio=log_q[states, ids] - drawn)]])
        logits = p_logits.clone().requires_grad_()
        losses = objective.token_losses(logits[states], DenseScores(log_q[states], ids), collate([shaped], 0).tokens)
        total += drawn.sum().exp() * torch.autograd.grad(losses.sum(), logits)[0]
    return total


@pytest.mark.parametrize("single_step", [True, False], ids=["one step exact", "undivided"])
@pytest.mark.parametrize("importance", [None, Clipped()], ids=repr)
def test_both_forms_have_the_gradient_of_the_kl_of_whole_answers(single_step, importance):
    generator = torch.Generator().manual_seed(3)
    p_logits, q_logits = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    objective = LongReturn(length_normalized=False, single_step=single_step, importance=importance)
    expected = whole_gradient(p_logits, q_logits)
    torch.testing.assert_close(expected_gradient(objective, p_logits, q_logits), expected, atol=1e-6, rtol=0)
    equal = expected_gradient(objective, q_logits, q_logits)
    torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-12, rtol=0)


def test_without_a_future_it_is_the_reverse_kl_of_each_state():
    case = make_case()
    ids = case.response_ids
    rollout = Rollout(Problem("a", ()), ids, ids, case.rollout_log_probs, False, seed=0)
    objective = LongReturn(gamma=0)
    [[shaped]] = objective.shape([[attach(rollout, log_ratio=torch.arange(4.0))]])
    case_tokens = replace(case.tokens, extras={"following": shaped.extras["following"]})
    losses = objective.token_losses(case.logits, case.scores(), case_tokens)
    torch.testing.assert_close(losses, case.losses(DivergenceObjective()))


def test_log_ratios_are_clipped_and_the_teacher_is_asked_for_what_is_needed():
    ids = torch.arange(3)
    rollout = attach(Rollout(Problem("a", ()), ids, ids, torch.zeros(3), False, 0), log_ratio=torch.full((3,), -9.0))
    [[shaped]] = LongReturn(advantage_clip=2.0).shape([[rollout]])
    assert shaped.extras["following"].tolist() == [-2, -2, 0]
    assert LongReturn().request() == ScoreRequest(full_vocabulary=True)
    assert LongReturn(single_step=False).request() == ScoreRequest()
    assert LongReturn(importance=None).needs_rollout_log_probs


def test_settings():
    with pytest.raises(ValueError, match=r"objective\.gamma: expected a number in \[0, 1\]"):
        LongReturn(gamma=1.5)
    with pytest.raises(ValueError, match=r"LongReturn is made of log-ratios.*Leave both out"):
        LongReturn(divergence=ForwardKL())
