"""Losses and gradients of objectives against explicit float64 formulas."""

import itertools
import math

import pytest
import torch
from objective_cases import (
    DIRECT,
    REFERENCES,
    TOP_K,
    Case,
    build,
    gradient,
    make_case,
    make_support,
    make_tokens,
    on_support,
    reverse_kl,
    support_sets,
)

from opd_lightning.objectives import (
    CandidateScore,
    Clipped,
    DenseScores,
    Direct,
    DivergenceObjective,
    ForwardKL,
    Intersection,
    JensenShannon,
    Masked,
    ReverseKL,
    SampledToken,
    SampledTokenObjective,
    SymmetricDifference,
    Truncated,
)

DIVERGENCES = [ReverseKL(), ForwardKL(), JensenShannon(0.3)]
IMPORTANCES = [None, Truncated(), Masked(), Clipped()]


def accepted_objectives():
    """Every accepted combination of the factors, at k = 3."""
    supports = [make_support(*pair) for pair in itertools.product(TOP_K, [3], ["renormalize", "tail", "none"])]
    supports += [make_support("full_vocabulary", 3), SampledToken()]
    weights = itertools.product(
        ["student_probability", "teacher_probability", "uniform"], ["normalized", "raw"], [False, True], [None, 0.5]
    )
    estimators = [Direct(), *(CandidateScore(*settings) for settings in weights)]
    objectives = []
    for support, divergence, estimator in itertools.product(supports, DIVERGENCES, estimators):
        try:
            objectives.append(DivergenceObjective(support, divergence, estimator))
        except ValueError:  # the refusals are test_objective_settings's
            continue
    sampled = itertools.product(DIVERGENCES, IMPORTANCES, [None, 0.5])
    return objectives + [
        SampledTokenObjective(divergence, importance, advantage_clip=clip) for divergence, importance, clip in sampled
    ]


ACCEPTED = accepted_objectives()


def assert_zero(tensor, atol=1e-13):
    torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=atol, rtol=0)


def test_nothing_is_learnt_from_a_teacher_that_agrees_whatever_the_accepted_settings():
    case = make_case().agreeing()
    assert len(ACCEPTED) == 5 * 3 * 3 * 25 - 5 * 3 + 3 * 25 + 3 + 3 * 4 * 2  # all but direct ones unnormalised
    for objective in ACCEPTED:
        assert_zero(case.losses(objective))
        assert_zero(case.gradient(objective))


def test_losses_and_gradients_stay_finite_when_models_exclude_tokens():
    case = make_case()
    case.teacher_logits[:, [1, 4]] = -math.inf
    case.logits[:2, [2, 4]] = -math.inf
    for objective in ACCEPTED:
        assert case.losses(objective).isfinite().all(), vars(objective)
        assert case.gradient(objective).isfinite().all(), vars(objective)


def test_an_empty_support_costs_nothing_and_teaches_nothing():
    case = make_case()
    apart, alike = Case(**vars(case)), Case(**vars(case))
    apart.teacher_logits, alike.teacher_logits = -case.logits, 2 * case.logits
    for objective in ACCEPTED:
        support = getattr(objective, "support", None)
        empty = {Intersection: apart, SymmetricDifference: alike}.get(type(support))
        if empty is not None:
            assert (empty.losses(objective) == 0).all()
            assert (empty.gradient(objective) == 0).all()


@pytest.mark.parametrize(("support", "normalization"), DIRECT)
@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_direct_losses_are_the_divergence_on_the_support(support, normalization, divergence):
    objective = build(support, 4, normalization, divergence=divergence)
    reference = REFERENCES[divergence]
    case = make_case(seed=3)
    expected = [
        reference(*(on_support(row, tokens, normalization) for row in (p, q)))
        for p, q, tokens in zip(case.p, case.q, support_sets(case, support, 4), strict=True)
    ]
    torch.testing.assert_close(case.losses(objective), torch.stack(expected))


@pytest.mark.parametrize(("support", "normalization"), DIRECT)
@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_direct_gradients_pass_finite_differences(support, normalization, divergence):
    case = make_case(n=2, vocabulary=6)
    objective = build(support, 3, normalization, divergence=divergence)
    assert torch.autograd.gradcheck(lambda z: case.losses(objective, z), case.logits.clone().requires_grad_())


def explicit_score_function(case, estimator, tokens, row, weight, reward):
    """-sum_v w(v) A(v) grad log p(v) of one position, from the one-hot form of grad log p."""
    order = sorted(tokens)
    weights = weight[order]
    if estimator.scale != "raw":
        weights = weights / weights.sum()
    advantages = reward(case.p[row], case.q[row])[order]
    if estimator.centered:
        advantages = advantages - (weights * advantages).sum() / weights.sum()
    one_hot = torch.nn.functional.one_hot(torch.tensor(order), case.p.shape[-1]).double()
    return -((weights * advantages)[:, None] * (one_hot - case.p[row])).sum(0)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scale", ["normalized", "raw"])
@pytest.mark.parametrize("weighting", ["student_probability", "teacher_probability", "uniform"])
@pytest.mark.parametrize("support", [*TOP_K, "full_vocabulary"])
def test_score_function_gradients_are_weighted_rewards(support, weighting, scale, centered):
    rewards = {
        ReverseKL(): lambda p, q: q.log() - p.log(),
        ForwardKL(): lambda p, q: q / p - 1,
        JensenShannon(0.3): lambda p, q: -0.7 * (p / (0.3 * q + 0.7 * p)).log(),
    }
    case = make_case(seed=5)
    for divergence, reward in rewards.items():
        estimator = CandidateScore(weighting, scale, centered)
        objective = build(support, 4, "none", divergence=divergence, estimator=estimator)
        weights = {"student_probability": case.p, "teacher_probability": case.q, "uniform": torch.ones_like(case.p)}
        expected = [
            explicit_score_function(case, estimator, tokens, row, weights[weighting][row], reward)
            for row, tokens in enumerate(support_sets(case, support, 4))
        ]
        torch.testing.assert_close(case.gradient(objective), torch.stack(expected))


def sampled_case(log_ratio, advantage):
    """One position over two tokens, token 0 sampled, with the given importance log-ratio and log q - log p."""
    log_p = math.log(0.5)
    logits = torch.zeros(1, 2, dtype=torch.float64)
    q = math.exp(log_p + advantage)
    scores = DenseScores(torch.tensor([[q, 1 - q]], dtype=torch.float64).log(), torch.tensor([0]))
    rollout = torch.tensor([log_p - log_ratio], dtype=torch.float64)
    return logits, scores, make_tokens(torch.tensor([0]), rollout)


def slope(objective, log_ratio, advantage):
    """Gradient of the loss with respect to log p of the sampled token (half of it reaches the token's logit)."""
    logits, scores, tokens = sampled_case(log_ratio, advantage)
    grad = gradient(lambda z: objective.token_losses(z, scores, tokens), logits)
    return grad[0, 0].item() / 0.5


@pytest.mark.parametrize(("ratio", "used"), [(0.5, 0.5), (1.0, 1.0), (4.9, 4.9), (5.0, 5.0), (30.0, 5.0)])
def test_truncated_importance_is_capped(ratio, used):
    assert slope(SampledTokenObjective(), math.log(ratio), -0.4) == pytest.approx(used * 0.4)


@pytest.mark.parametrize(
    ("ratio", "used"), [(0.19, 0.0), (0.21, 0.21), (1.0, 1.0), (4.9, 4.9), (5.1, 0.0), (30.0, 0.0)]
)
def test_masked_importance_leaves_out_what_is_too_far_off(ratio, used):
    objective = SampledTokenObjective(importance=Masked())
    assert slope(objective, math.log(ratio), -0.4) == pytest.approx(used * 0.4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 0.5, -0.5),  # inside: the plain policy gradient
        (1.1, 0.5, -1.1 * 0.5),
        (1.4, 0.5, 0.0),  # already pushed up far enough
        (1.4, -0.5, 1.4 * 0.5),  # to be pushed down, has gone up: still counts
        (0.6, -0.5, 0.0),  # already pushed down far enough
        (0.6, 0.5, -0.6 * 0.5),
    ],
)
def test_clipping_stops_at_the_clip_only_in_the_direction_of_the_advantage(ratio, advantage, expected):
    objective = SampledTokenObjective(importance=Clipped(low=0.2, high=0.3))
    assert slope(objective, math.log(ratio), advantage) == pytest.approx(expected)
    value = objective.token_losses(*sampled_case(math.log(ratio), advantage)).item()
    assert value == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage))


def test_advantages_are_clipped_before_they_are_centred():
    case = make_case()
    objective = DivergenceObjective(estimator=CandidateScore(centered=True, advantage_clip=0.3))
    clipped = (case.q.log() - case.p.log()).clamp(-0.3, 0.3)
    centred = clipped - (case.p * clipped).sum(-1, keepdim=True)
    torch.testing.assert_close(case.gradient(objective), -case.p * centred)
    sampled = SampledTokenObjective(advantage_clip=0.3)
    assert slope(sampled, 0.0, -2.0) == pytest.approx(0.3)


def test_temperatures_divide_the_logits_of_their_model():
    case = make_case()
    objective = DivergenceObjective(student_temperature=0.5, teacher_temperature=2.0)
    p, q = (case.logits / 0.5).softmax(-1), (case.teacher_logits / 2.0).softmax(-1)
    torch.testing.assert_close(case.losses(objective), reverse_kl(p, q))
    expected = p * ((p / q).log() - reverse_kl(p, q)[:, None]) / 0.5
    torch.testing.assert_close(case.gradient(objective), expected)


def plain_objective(support, **temperatures):
    """With each support's defaults; "sampled_token_policy" is the policy gradient on the sampled token."""
    if support == "sampled_token_policy":
        return SampledTokenObjective(**temperatures)
    return DivergenceObjective(make_support(support, 4), **temperatures)


@pytest.mark.parametrize("support", ["sampled_token_policy", "sampled_token", *TOP_K, "full_vocabulary"])
def test_a_tempered_objective_is_the_plain_one_on_tempered_logits(support):
    case = make_case()
    tempered = plain_objective(support, student_temperature=0.5, teacher_temperature=2.0)
    plain = plain_objective(support)
    divided = Case(case.logits / 0.5, case.teacher_logits / 2.0, case.response_ids, case.rollout_log_probs)
    torch.testing.assert_close(case.losses(tempered), divided.losses(plain))
    torch.testing.assert_close(case.gradient(tempered), divided.gradient(plain) / 0.5)


@pytest.mark.parametrize("support", ["sampled_token_policy", "sampled_token", "student_top_k", "full_vocabulary"])
def test_half_precision_logits_give_float32_losses(support):
    case = make_case(vocabulary=50)
    objective = plain_objective(support)
    rounded = case.logits.bfloat16()
    scores = DenseScores(case.q.log().float(), case.response_ids)

    def losses(logits):
        return objective.token_losses(logits, scores, make_tokens(case.response_ids, case.rollout_log_probs.float()))

    assert losses(rounded).dtype == torch.float32
    torch.testing.assert_close(losses(rounded).double(), case.losses(objective, rounded.double()), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(losses(rounded), losses(rounded.float()), atol=0, rtol=0)
    assert gradient(losses, rounded).dtype == torch.bfloat16


def test_no_gradient_reaches_the_teacher_or_the_rollout():
    case = make_case()
    case.rollout_log_probs.requires_grad_()
    case.losses(SampledTokenObjective(), case.logits.clone().requires_grad_()).sum().backward()
    assert case.rollout_log_probs.grad is None


def test_no_positions_give_no_losses():
    case = make_case(n=0)
    for objective in ACCEPTED[::7]:
        assert case.losses(objective).shape == (0,)
