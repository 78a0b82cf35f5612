"""The control variate of vOPD (arXiv 2605.07865): A = log q(y) - log p(y) + KL(p || q)."""

from dataclasses import replace

import pytest
import torch
from objective_cases import expected_over_samples, make_case, make_tokens, reverse_kl

from opd_lightning.methods import KLBaseline
from opd_lightning.objectives import Clipped, DivergenceObjective, SampledTokenObjective


def advantages_of_every_token(case, advantage):
    """[n, V]: the advantage of each token at each position."""
    columns = []
    for token in range(case.logits.shape[-1]):
        ids = torch.full_like(case.response_ids, token)
        rewards = (case.q / case.p).log()[:, token]
        tokens = make_tokens(ids, case.rollout_log_probs)
        columns.append(advantage(rewards, case.logits, replace(case, response_ids=ids).scores(), tokens))
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_advantage_of_the_exact_baseline_is_0(seed):
    case = make_case(seed)
    advantages = advantages_of_every_token(case, KLBaseline())
    expected = (case.p * advantages).sum(-1)
    torch.testing.assert_close(expected, torch.zeros_like(expected), atol=1e-13, rtol=0)
    torch.testing.assert_close(advantages_of_every_token(case, KLBaseline(k=9)), advantages)


@pytest.mark.parametrize("importance", [None, Clipped()], ids=repr)
@pytest.mark.parametrize("k", [None, 1, 4, 9])
def test_no_baseline_changes_the_expected_gradient(k, importance):
    case = make_case()
    with_baseline = SampledTokenObjective(importance=importance, advantage=KLBaseline(k))
    expected = case.gradient(DivergenceObjective())
    torch.testing.assert_close(expected_over_samples(case, with_baseline, case.p.log()), expected)


def test_the_variance_changes_as_derived_and_falls_over_many_states():
    # Var_without - Var_with = KL^2 E|G|^2 - 2 KL Cov(l, |G|^2), G = grad log p(v). It need not fall at each state.
    case = make_case(seed=1, n=400, vocabulary=8, spread=1.0)
    square = ((torch.eye(8, dtype=torch.float64) - case.p[:, None, :]) ** 2).sum(-1)  # |G(v)|^2 of every v
    rewards = (case.q / case.p).log()
    kl = reverse_kl(case.p, case.q)

    def second_moment(advantages):
        return (case.p * advantages**2 * square).sum(-1)

    gained = second_moment(rewards) - second_moment(advantages_of_every_token(case, KLBaseline()))
    # both have the same mean, so second moments differ as variances do; E[l] = -KL
    covariance = (case.p * rewards * square).sum(-1) + kl * (case.p * square).sum(-1)
    derived = kl**2 * (case.p * square).sum(-1) - 2 * kl * covariance
    torch.testing.assert_close(gained, derived)
    assert gained.sum() > 0


def test_a_student_that_equals_its_teacher_learns_nothing():
    case = make_case().agreeing()
    losses = case.losses(SampledTokenObjective(advantage=KLBaseline()))
    torch.testing.assert_close(losses, torch.zeros_like(losses), atol=1e-13, rtol=0)
    gradient = case.gradient(SampledTokenObjective(advantage=KLBaseline()))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)


def test_k_counts_tokens():
    with pytest.raises(ValueError, match=r"advantage.k: expected at least 1, or null"):
        KLBaseline(0)
