"""The seam of advantages, with the control variate of vOPD (arXiv 2605.07865): A = log q(y) - log p(y) + KL(p || q)."""

from dataclasses import replace

import pytest
import torch
from objective_cases import expected_over_samples, make_case, make_tokens, reverse_kl

from opd_lightning.interfaces import Advantage, ScoreRequest
from opd_lightning.objectives import (
    Clipped,
    DivergenceObjective,
    SampledTokenObjective,
    full_log_probs,
)


class KLBaseline(Advantage):
    """Subtract from the reward its expectation under the student; with k an estimate on the student's top k."""

    def __init__(self, k=None):
        self.k = k

    def request(self, needed):
        return replace(needed, full_vocabulary=True) if self.k is None else replace(needed, arbitrary_ids=True)

    def __call__(self, rewards, student_logits, teacher, tokens):
        student = full_log_probs(student_logits)
        if self.k is None:
            log_p, log_q = student, teacher.full()
        else:  # renormalised within the set
            log_p, ids = student.topk(self.k)
            log_p, log_q = log_p.log_softmax(-1), teacher.at(ids).log_softmax(-1)
        return rewards + (log_p.exp() * (log_p - log_q)).sum(-1)


class Remembered(Advantage):
    """Notes what it is given."""

    def __call__(self, *given):
        self.given = given
        return given[0]


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


def test_an_advantage_asks_the_teacher_for_what_it_needs():
    objective = SampledTokenObjective(advantage=KLBaseline(), teacher_temperature=2.0)
    assert objective.request() == ScoreRequest(full_vocabulary=True, temperature=2.0)
    assert SampledTokenObjective(advantage=Remembered()).request() == ScoreRequest()


def test_an_advantage_sees_clipped_rewards_tempered_logits_and_the_tokens_and_no_gradient():
    case = make_case()
    advantage = Remembered()
    objective = SampledTokenObjective(advantage=advantage, advantage_clip=0.5, student_temperature=0.5)
    tokens = replace(case.tokens, extras={"depth": torch.arange(4.0)})
    logits = case.logits.clone().requires_grad_()
    losses = objective.token_losses(logits, case.scores(), tokens)
    rewards, student_logits, teacher, seen = advantage.given
    log_p = (case.logits / 0.5).log_softmax(-1)[range(4), case.response_ids]
    torch.testing.assert_close(rewards, (case.q.log()[range(4), case.response_ids] - log_p).clamp(-0.5, 0.5))
    torch.testing.assert_close(student_logits, case.logits / 0.5)
    assert teacher.num_tokens == 4
    assert seen.extras["depth"].tolist() == [0, 1, 2, 3]
    assert not rewards.requires_grad
    assert not student_logits.requires_grad
    assert losses.requires_grad


def test_a_student_that_equals_its_teacher_learns_nothing():
    case = make_case().agreeing()
    losses = case.losses(SampledTokenObjective(advantage=KLBaseline()))
    torch.testing.assert_close(losses, torch.zeros_like(losses), atol=1e-13, rtol=0)
    gradient = case.gradient(SampledTokenObjective(advantage=KLBaseline()))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)


@pytest.mark.parametrize("advantage", [None, KLBaseline(), KLBaseline(3)], ids=["none", "exact", "top 3"])
def test_who_looks_on_sees_the_advantages_of_the_losses(advantage):
    case = make_case(2)
    objective = SampledTokenObjective(advantage=advantage, importance=None, advantage_clip=0.3)
    shown = objective.advantages(case.logits, case.scores(), case.tokens)
    log_probs = case.p.log()[range(4), case.response_ids]
    torch.testing.assert_close(-shown * log_probs, case.losses(objective))
    assert DivergenceObjective().advantages(case.logits, case.scores(), case.tokens) is None
