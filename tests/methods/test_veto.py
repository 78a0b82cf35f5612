"""Veto (arXiv 2601.07155): the target Q proportional to q p^beta, with p detached and beta falling to 0."""

from dataclasses import replace

import pytest
import torch
from objective_cases import forward_kl, make_case, reverse_kl

from opd_lightning.methods import Veto
from opd_lightning.objectives import DivergenceObjective, ForwardKL, ReverseKL

REFERENCES = {ForwardKL(): forward_kl, ReverseKL(): reverse_kl}


def at_step(case, objective, steps, logits=None):
    tokens = replace(case.tokens, extras={"step": torch.as_tensor(steps, dtype=torch.float32).expand(len(case.logits))})
    logits = (case.logits if logits is None else logits).clone().requires_grad_()
    losses = objective.token_losses(logits, case.scores(), tokens)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_the_loss_is_the_divergence_from_the_detached_target(divergence):
    case = make_case()
    target = (case.q * case.p**0.5) / (case.q * case.p**0.5).sum(-1, keepdim=True)
    losses, gradient = at_step(case, Veto(0.5, divergence=divergence), 7)
    torch.testing.assert_close(losses, REFERENCES[divergence](case.p, target))
    logits = case.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(REFERENCES[divergence](logits.softmax(-1), target).sum(), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_without_beta_it_is_plain_distillation(divergence):
    case = make_case()
    plain = DivergenceObjective(divergence=divergence)
    ended = Veto(0.8, decay_steps=10, divergence=divergence)
    for objective, step in [(Veto(0.0, divergence=divergence), 0), (ended, 10), (ended, 1000)]:
        losses, gradient = at_step(case, objective, step)
        torch.testing.assert_close(losses, case.losses(plain))
        torch.testing.assert_close(gradient, case.gradient(plain))


@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_the_fixed_point_is_sharper_than_the_teacher(divergence):
    case = make_case(spread=1.0)
    fixed = case.teacher_logits / (1 - 0.6)
    _, gradient = at_step(case, Veto(0.6, divergence=divergence), 0, fixed)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)
    _, gradient = at_step(case, Veto(0.6, divergence=divergence), 0, case.teacher_logits)
    assert gradient.abs().max() > 0.01  # p = q is not it


def test_beta_falls_linearly_and_each_token_has_that_of_its_step():
    case = make_case()
    mixed, _ = at_step(case, Veto(1.0, decay_steps=4), [0, 1, 2, 5])
    apart = [at_step(case, Veto(beta, decay_steps=10**9), 0)[0][i] for i, beta in enumerate([1.0, 0.75, 0.5, 0.0])]
    torch.testing.assert_close(mixed, torch.stack(apart))
    torch.testing.assert_close(case.losses(Veto(0.5, decay_steps=4)), case.losses(Veto(0.5)))  # outside of a run


def test_tokens_that_the_student_excludes_are_no_nan():
    case = make_case()
    logits = case.logits.clone()
    logits[:, 0] = -torch.inf
    for divergence in REFERENCES:
        losses, gradient = at_step(case, Veto(0.5, divergence=divergence), 0, logits)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, r"objective\.beta: expected a number of at least 0"),
        ({"beta": 1.0}, r"objective\.decay_steps: with beta=1\.0 the target has no fixed point.*trainer\.max_steps"),
        ({"decay_steps": 0}, r"objective\.decay_steps: expected an integer of at least 1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Veto(**settings)
