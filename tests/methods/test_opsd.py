"""OPSD's divergence (arXiv 2601.18734): the forward KL with each entry's term bounded."""

from __future__ import annotations

import math

import pytest
import torch
from objective_cases import forward_kl, make_case

from opd_lightning.methods import ClippedForwardKL
from opd_lightning.objectives import DivergenceObjective, ForwardKL


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_each_entry_is_bounded_by_itself(tau):
    case = make_case()
    terms = case.q * (case.q / case.p).log()
    assert (terms > tau).any() and (terms < 0).any()
    losses = case.losses(DivergenceObjective(divergence=ClippedForwardKL(tau)))
    torch.testing.assert_close(losses, terms.clamp(max=tau).sum(-1))
    free = terms <= tau  # only these have a gradient: -q in log p
    mine = case.q * free
    expected = case.p * mine.sum(-1, keepdim=True) - mine
    torch.testing.assert_close(case.gradient(DivergenceObjective(divergence=ClippedForwardKL(tau))), expected)


def test_without_a_bound_it_is_the_forward_kl():
    case = make_case()
    free, plain = (DivergenceObjective(divergence=each) for each in (ClippedForwardKL(math.inf), ForwardKL()))
    torch.testing.assert_close(case.losses(free), forward_kl(case.p, case.q))
    torch.testing.assert_close(case.gradient(free), case.gradient(plain))
    log_p, log_q = case.p.log(), case.q.log()
    torch.testing.assert_close(ClippedForwardKL(math.inf).reward(log_p, log_q), ForwardKL().reward(log_p, log_q))


def test_equal_models_stand_still():
    case = make_case().agreeing()
    objective = DivergenceObjective(divergence=ClippedForwardKL())
    for found in (
        case.losses(objective),
        case.gradient(objective),
        ClippedForwardKL().reward(case.p.log(), case.q.log()),
    ):
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


def test_the_bound_is_positive():
    with pytest.raises(ValueError, match=r"divergence\.tau: expected a positive number"):
        ClippedForwardKL(0)
