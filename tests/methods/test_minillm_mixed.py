"""MiniLLM's teacher-mixed sampling (arXiv 2306.08543): the weights, and returns against the student alone.

How tokens are drawn is tests/rollouts/test_teacher_mixed.py.
"""

import math

import pytest
import torch
import yaml
from built_methods import ROOT

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.methods import LongReturn
from opd_lightning.objectives import DenseScores, Truncated
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.shaping import attach, attach_log_ratios

CONFIG = yaml.safe_load((ROOT / "configs" / "methods" / "minillm_mixed.yaml").read_text())


def drawn(ids, log_mixture, log_p, log_q):
    """An answer with what a source and the teacher say of it; all [T], of its tokens."""
    rollout = Rollout(Problem("a", ()), torch.tensor([1]), ids, log_mixture, False, seed=0)
    rollout = attach(rollout, student_log_prob=log_p)
    scores = DenseScores(log_q[:, None], torch.zeros_like(ids))
    return attach_log_ratios([rollout], [collate([rollout], 0)], [scores])[0]


def test_what_follows_is_compared_with_the_student_and_not_with_the_mixture():
    log_p, log_q = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.1, -0.3, -2.5])
    mixture = torch.logaddexp(log_p + math.log(0.8), log_q + math.log(0.2))
    [[shaped]] = LongReturn(length_normalized=False).shape([[drawn(torch.arange(3), mixture, log_p, log_q)]])
    torch.testing.assert_close(shaped.extras["following"], torch.tensor([1.7 - 2.0, -2.0, 0.0]))


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_with_its_weights_the_expected_gradient_of_one_token_is_that_of_the_reverse_kl(share):
    generator = torch.Generator().manual_seed(4)
    p_logits, q_logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    mixture = (1 - share) * log_p.exp() + share * log_q.exp()
    objective = LongReturn(single_step=False, importance=Truncated(cap=1e9))
    total = torch.zeros_like(p_logits)
    for token in range(7):
        ids = torch.tensor([token])
        made = drawn(ids, mixture.log()[ids], log_p[ids], log_q[ids])
        [[shaped]] = objective.shape([[made]])
        logits = p_logits.clone().requires_grad_()
        losses = objective.token_losses(logits[None], DenseScores(log_q[None], ids), collate([shaped], 0).tokens)
        total += mixture[token] * torch.autograd.grad(losses.sum(), logits)[0]
    logits = p_logits.clone().requires_grad_()
    reverse_kl = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - log_q)).sum()
    torch.testing.assert_close(total, torch.autograd.grad(reverse_kl, logits)[0], atol=1e-6, rtol=0)


def test_the_configuration_has_the_share_of_the_paper():
    assert CONFIG["data"]["source"]["init_args"] == {"teacher_share": 0.2}
