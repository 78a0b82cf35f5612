"""Identities between the variants of objectives, on the gradients that they give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import DIRECT, REFERENCES, build, expected_over_samples, gradient, make_case

from opd_lightning.objectives import (
    CandidateScore,
    Clipped,
    DivergenceObjective,
    Masked,
    ReverseKL,
    SampledTokenObjective,
    StudentTopK,
    Truncated,
)

seeds = st.integers(0, 10_000)


def assert_zero(tensor):
    torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=1e-13, rtol=0)


@pytest.mark.parametrize("normalization", ["renormalize", "tail"])
@pytest.mark.parametrize("support", ["student_top_k", "teacher_top_k", "intersection", "union"])
@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_k_of_the_vocabulary_size_is_the_full_vocabulary(support, normalization, divergence):
    case = make_case()
    whole = DivergenceObjective(divergence=divergence)
    for k in (9, 50):
        objective = build(support, k, normalization, divergence=divergence)
        torch.testing.assert_close(case.losses(objective), case.losses(whole))
        torch.testing.assert_close(case.gradient(objective), case.gradient(whole), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(case.losses(whole), REFERENCES[divergence](case.p, case.q))


@pytest.mark.parametrize("support", ["student_top_k", "teacher_top_k"])
def test_a_tail_of_one_token_is_the_full_vocabulary(support):
    case = make_case()
    objective = build(support, 8, "tail")
    torch.testing.assert_close(case.losses(objective), case.losses(DivergenceObjective()))
    torch.testing.assert_close(case.gradient(objective), case.gradient(DivergenceObjective()))


@given(seeds, st.integers(2, 8))
def test_a_tail_loses_information_but_never_adds_any(seed, k):
    case = make_case(seed)
    bucketed = case.losses(DivergenceObjective(StudentTopK(k, "tail")))
    assert (bucketed <= case.losses(DivergenceObjective()) + 1e-12).all()
    assert (bucketed >= -1e-12).all()


@pytest.mark.parametrize(("support", "normalization"), [pair for pair in DIRECT if pair[0] != "sampled_token"])
@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
@given(seed=seeds)
@settings(max_examples=10)
def test_on_whole_distributions_the_score_function_is_the_direct_gradient(support, normalization, divergence, seed):
    case = make_case(seed)
    direct = build(support, 4, normalization, divergence=divergence)
    for centered in (False, True):
        estimator = CandidateScore(centered=centered)
        scored = build(support, 4, normalization, divergence=divergence, estimator=estimator)
        torch.testing.assert_close(case.gradient(scored), case.gradient(direct))


def paper(k):
    return DivergenceObjective(StudentTopK(k))


def authors(k, centered=False):
    return DivergenceObjective(StudentTopK(k, "none"), estimator=CandidateScore(centered=centered))


@given(seeds, st.integers(2, 9))
def test_centred_advantages_give_the_gradient_of_equation_5(seed, k):
    case = make_case(seed)
    torch.testing.assert_close(case.gradient(authors(k, centered=True)), case.gradient(paper(k)))


@given(seeds, st.integers(1, 9))
def test_the_authors_gradient_is_equation_5_plus_a_term_that_moves_mass(seed, k):
    case = make_case(seed)
    ids = case.logits.topk(k).indices
    p, q = case.p.gather(-1, ids), case.q.gather(-1, ids)
    mean_log_ratio = (p / p.sum(-1, keepdim=True) * (p / q).log()).sum(-1)
    moving = gradient(lambda z: mean_log_ratio * z.softmax(-1).gather(-1, ids).sum(-1).log(), case.logits)
    renormalized = case.gradient(paper(k)) if k > 1 else torch.zeros_like(case.logits)
    torch.testing.assert_close(case.gradient(authors(k)), renormalized + moving)


def test_renormalised_gradients_leave_tokens_outside_the_support_alone():
    case = make_case()
    outside = torch.ones_like(case.p, dtype=torch.bool).scatter(-1, case.logits.topk(4).indices, False)
    assert_zero(case.gradient(paper(4))[outside])


def test_renormalised_gradients_vanish_when_the_student_is_proportional_on_the_support():
    case = make_case()
    ids = case.logits.topk(4).indices
    case.teacher_logits = torch.randn_like(case.logits).scatter(-1, ids, case.logits.gather(-1, ids) + 3)
    assert_zero(case.gradient(paper(4)))


def test_the_refused_unnormalised_direct_loss_would_move_an_agreeing_student():
    case = make_case().agreeing()
    ids = case.logits.topk(3).indices

    def unnormalized(z):
        return ReverseKL().value(z.log_softmax(-1).gather(-1, ids), case.q.log().gather(-1, ids))

    mass = case.p.gather(-1, ids).sum(-1, keepdim=True)
    inside = torch.zeros_like(case.p).scatter(-1, ids, 1.0)
    expected = case.p * (inside - mass)
    torch.testing.assert_close(gradient(unnormalized, case.logits), expected)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("importance", [None, Truncated(), Masked(), Clipped()], ids=repr)
@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_the_sampled_token_is_unbiased_on_policy(divergence, importance):
    case = make_case()
    sampled = SampledTokenObjective(divergence, importance)
    expected = case.gradient(DivergenceObjective(divergence=divergence))
    torch.testing.assert_close(expected_over_samples(case, sampled, case.p.log()), expected)


def test_the_importance_ratio_makes_up_for_another_sampler():
    case = make_case()
    other = (case.logits + 0.3 * case.teacher_logits).log_softmax(-1)
    expected = case.gradient(DivergenceObjective())
    corrected = expected_over_samples(case, SampledTokenObjective(importance=Truncated(1e6)), other)
    torch.testing.assert_close(corrected, expected)
    uncorrected = expected_over_samples(case, SampledTokenObjective(importance=None), other)
    assert (uncorrected - expected).abs().max() > 0.01
