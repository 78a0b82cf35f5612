"""MAD-OPD (arXiv 2605.01347): the weighted mean of the losses against each teacher."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import gradient, make_case, make_tokens

from opd_lightning.interfaces import LinearHead
from opd_lightning.methods import MeanOverTeachers
from opd_lightning.objectives import DenseScores, DivergenceObjective, ForwardKL, JensenShannon, ReverseKL
from opd_lightning.objectives.chunks import compare_in_chunks
from opd_lightning.teachers.mixture import MixedScores

WEIGHTS = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8], [0.9, 0.1]], dtype=torch.float64)


def debated(mean="arithmetic", weights=WEIGHTS):
    """A case, one whose teacher is another, and the scores of both teachers."""
    case = make_case()
    other = replace(case, teacher_logits=make_case(7).teacher_logits)
    scores = [DenseScores(each.q.log(), case.response_ids) for each in (case, other)]
    return case, other, MixedScores(scores, weights, mean)


def loss_and_gradient(objective, case, scores):
    tokens = make_tokens(case.response_ids, case.rollout_log_probs)
    return objective.token_losses(case.logits, scores, tokens), gradient(
        lambda logits: objective.token_losses(logits, scores, tokens), case.logits
    )


@pytest.mark.parametrize("divergence", [JensenShannon(0.5), ReverseKL()], ids=repr)
def test_losses_are_averaged_by_weight(divergence):
    case, other, scores = debated()
    plain = DivergenceObjective(divergence=divergence)
    losses, found = loss_and_gradient(MeanOverTeachers(plain), case, scores)
    first, second = WEIGHTS.unbind(-1)
    torch.testing.assert_close(losses, first * case.losses(plain) + second * other.losses(plain))
    expected = first[:, None] * case.gradient(plain) + second[:, None] * other.gradient(plain)
    torch.testing.assert_close(found, expected)
    equal = debated(weights=torch.full((4, 2), 0.5, dtype=torch.float64))[2]
    losses, _ = loss_and_gradient(MeanOverTeachers(plain), case, equal)
    torch.testing.assert_close(losses, (case.losses(plain) + other.losses(plain)) / 2)


def test_one_teacher_is_plain_distillation_and_the_default_is_bounded():
    case, _, scores = debated()
    plain = DivergenceObjective(divergence=JensenShannon(0.5))
    losses, found = loss_and_gradient(MeanOverTeachers(), case, case.scores())
    assert torch.equal(losses, case.losses(plain)) and torch.equal(found, case.gradient(plain))
    assert loss_and_gradient(MeanOverTeachers(), case, scores)[0].max() <= math.log(2)


@pytest.mark.parametrize(("divergence", "mean"), [(ReverseKL(), "geometric"), (ForwardKL(), "arithmetic")], ids=repr)
def test_for_two_divergences_the_mixture_alone_has_the_gradient(divergence, mean):
    case, _, scores = debated(mean)
    plain = DivergenceObjective(divergence=divergence)
    _, expected = loss_and_gradient(MeanOverTeachers(plain), case, scores)
    _, found = loss_and_gradient(plain, case, scores)
    torch.testing.assert_close(found, expected)


def test_the_training_pass_asks_each_teacher_too():
    case, _, scores = debated()
    weight = torch.eye(9, dtype=torch.float64).requires_grad_()
    hidden = case.logits.clone().requires_grad_()
    objective = MeanOverTeachers()
    losses = compare_in_chunks(
        hidden, LinearHead(weight, None, 9), objective, scores, case.tokens, asked=objective.request(), facts_k=3
    ).losses
    expected, expected_gradient = loss_and_gradient(objective, case, scores)
    torch.testing.assert_close(losses.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), hidden)[0], expected_gradient)
