import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import forward_kl, gradient, jensen_shannon, make_case, reverse_kl

from opd_lightning.objectives import ForwardKL, JensenShannon, ReverseKL

REFERENCES = [
    (ReverseKL(), reverse_kl),
    (ForwardKL(), forward_kl),
    (JensenShannon(0.5), jensen_shannon(0.5)),
    (JensenShannon(0.1), jensen_shannon(0.1)),
    (JensenShannon(0.9), jensen_shannon(0.9)),
]
ALL = [divergence for divergence, _ in REFERENCES] + [JensenShannon(0), JensenShannon(1)]
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize(("divergence", "reference"), REFERENCES, ids=[repr(pair[0]) for pair in REFERENCES])
def test_value_is_the_textbook_formula(divergence, reference):
    case = make_case()
    value = divergence.value(case.p.log(), case.q.log())
    torch.testing.assert_close(value, reference(case.p, case.q))


def test_the_textbook_example_of_a_binomial_and_a_uniform_distribution():
    p = torch.tensor([[9 / 25, 12 / 25, 4 / 25]], dtype=torch.float64).log()
    q = torch.full_like(p, 1 / 3).log()
    ln2, ln3, ln5 = math.log(2), math.log(3), math.log(5)
    assert ReverseKL().value(p, q).item() == pytest.approx((32 * ln2 + 55 * ln3 - 50 * ln5) / 25)
    assert ForwardKL().value(p, q).item() == pytest.approx((-4 * ln2 - 6 * ln3 + 6 * ln5) / 3)


@given(seeds, st.floats(0.05, 6))
@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_divergences_are_positive_and_vanish_at_equality(divergence, seed, spread):
    case = make_case(seed, spread=spread)
    assert (divergence.value(case.p.log(), case.q.log()) > -1e-12).all()
    same = divergence.value(case.p.log(), case.p.log())
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-13, rtol=0)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_reward_is_minus_the_derivative_up_to_a_constant(divergence):
    case = make_case()
    probabilities = case.p.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(divergence.value(probabilities.log(), case.q.log()).sum(), probabilities)
    shift = divergence.reward(case.p.log(), case.q.log()) + derivative
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_reward_weighted_scores_are_the_gradient_of_the_divergence(divergence):
    case = make_case()
    reward = divergence.reward(case.p.log(), case.q.log())
    from_rewards = gradient(lambda z: -(case.p * reward * z.log_softmax(-1)).sum(-1), case.logits)
    direct = gradient(lambda z: divergence.value(z.log_softmax(-1), case.q.log()), case.logits)
    torch.testing.assert_close(from_rewards, direct)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_reward_is_zero_where_both_agree(divergence):
    log_p = make_case().p.log()
    reward = divergence.reward(log_p, log_p)
    torch.testing.assert_close(reward, torch.zeros_like(reward), atol=1e-14, rtol=0)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_gradients_pass_finite_differences(divergence):
    case = make_case(n=2, vocabulary=5)
    mask = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence.value(z.log_softmax(-1), case.q.log(), mask), logits)


def test_jensen_shannon_ends_are_the_two_kullback_leibler_divergences():
    p, q = make_case().p.log(), make_case().q.log()
    for end, kl in ((JensenShannon(0), ForwardKL()), (JensenShannon(1), ReverseKL())):
        assert torch.equal(end.value(p, q), kl.value(p, q))
        assert torch.equal(end.reward(p, q), kl.reward(p, q))


def test_jensen_shannon_tends_to_its_ends_after_rescaling():
    p, q = make_case().p.log(), make_case().q.log()
    torch.testing.assert_close(JensenShannon(1e-7).value(p, q) / 1e-7, ForwardKL().value(p, q), rtol=1e-4, atol=0)
    torch.testing.assert_close(JensenShannon(1 - 1e-7).value(p, q) / 1e-7, ReverseKL().value(p, q), rtol=1e-4, atol=0)


@given(seeds, st.floats(0.1, 40))
def test_symmetric_jensen_shannon_is_symmetric_and_at_most_log_two(seed, spread):
    case = make_case(seed, spread=spread)
    value = JensenShannon(0.5).value(case.p.log(), case.q.log())
    assert (value <= math.log(2) + 1e-12).all()
    torch.testing.assert_close(value, JensenShannon(0.5).value(case.q.log(), case.p.log()))


@given(seeds, st.floats(0.01, 0.99))
def test_jensen_shannon_swaps_with_its_arguments(seed, beta):
    case = make_case(seed)
    one, other = JensenShannon(beta), JensenShannon(1 - beta)
    torch.testing.assert_close(one.value(case.p.log(), case.q.log()), other.value(case.q.log(), case.p.log()))


def test_disjoint_distributions_reach_log_two():
    p, q = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    torch.testing.assert_close(JensenShannon(0.5).value(p, q), torch.tensor([math.log(2)]))


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_impossible_tokens_give_finite_values_rewards_and_gradients(divergence):
    inf = math.inf
    logits = torch.tensor([[0.3, -inf, 1.0, -inf], [2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[0.1, 0.4, -inf, -inf], [-inf, 0.0, -inf, -inf]]).log_softmax(-1)
    value = divergence.value(logits.log_softmax(-1), teacher)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()
    assert divergence.reward(logits.log_softmax(-1), teacher).isfinite().all()


def test_a_token_impossible_for_both_changes_nothing():
    p, q = make_case().p, make_case().q
    padded_p, padded_q = (torch.cat([x, torch.zeros(4, 1, dtype=x.dtype)], -1).log() for x in (p, q))
    for divergence in ALL:
        torch.testing.assert_close(divergence.value(padded_p, padded_q), divergence.value(p.log(), q.log()))


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_masked_slots_neither_count_nor_receive_gradient(divergence):
    case = make_case()
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[0] = False
    student = torch.where(mask, case.p.log(), math.nan)  # whatever stands in a masked slot, NaN included
    student.requires_grad_()
    value = divergence.value(student, torch.where(mask, case.q.log(), -math.inf), mask)
    rows = [
        divergence.value(p[m].log()[None], q[m].log()[None])[0] for p, q, m in zip(case.p, case.q, mask, strict=True)
    ]
    torch.testing.assert_close(value, torch.stack(rows))
    value.sum().backward()
    assert (student.grad[~mask] == 0).all()
    assert value[0] == 0


def test_forward_reward_does_not_overflow_in_float32():
    reward = ForwardKL().reward(torch.tensor([[-500.0]]), torch.tensor([[-0.1]]))
    assert reward.isfinite().all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_outside_the_unit_interval_is_refused(beta):
    with pytest.raises(ValueError, match=r"divergence\.beta.*\[0, 1\]"):
        JensenShannon(beta)
