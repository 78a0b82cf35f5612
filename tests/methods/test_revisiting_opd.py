"""Revisiting OPD (arXiv 2603.25562) and Many Faces (2605.11182): identities of truncated reverse KLs; no own class."""

from dataclasses import replace

import torch
from objective_cases import make_case

from opd_lightning.objectives import CandidateScore, DivergenceObjective, ReverseKL, TeacherTopK

RENORMALISED = DivergenceObjective(TeacherTopK(4))
STOPPED = DivergenceObjective(TeacherTopK(4, normalization="none"), estimator=CandidateScore(scale="raw"))


def on_teachers_top(case, k=4):
    ids = case.q.topk(k).indices
    return torch.zeros_like(case.q, dtype=torch.bool).scatter(-1, ids, True)


def test_an_unnormalised_truncated_kl_moves_a_student_that_equals_its_teacher():
    case = make_case()
    p = case.q
    inside = on_teachers_top(case)
    logits = case.teacher_logits.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    terms = ReverseKL().terms(log_p, p.log()) * inside
    (gradient,) = torch.autograd.grad(terms.sum(), logits)
    mass = (p * inside).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, p * (inside.double() - mass))  # the "+1" of p log p: not 0
    assert gradient.abs().max() > 0.01


def test_renormalised_it_stands_still_wherever_both_are_proportional_on_the_set():
    case = make_case()
    inside = on_teachers_top(case)
    other = case.logits.where(~inside, case.teacher_logits + 0.7)  # another mass on the set, the same shape in it
    gradient = replace(case, logits=other).gradient(RENORMALISED)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)


def test_nothing_outside_the_set_gets_a_gradient():
    case = make_case()
    assert case.gradient(RENORMALISED)[~on_teachers_top(case)].abs().max() < 1e-15
    whole, exact = DivergenceObjective(TeacherTopK(9)), DivergenceObjective()
    torch.testing.assert_close(case.gradient(whole), case.gradient(exact))


def test_the_stop_gradient_remedy_is_the_same_loss_without_the_term_of_1():
    case = make_case()
    inside = on_teachers_top(case)
    logits = case.logits.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    detached = (log_p - case.q.log()).detach() * log_p.exp()
    (expected,) = torch.autograd.grad((detached * inside).sum(), logits)
    torch.testing.assert_close(case.gradient(STOPPED), expected)
    gradient = case.agreeing().gradient(STOPPED)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)
