"""Losses and gradients of `Objective` against explicit float64 formulas."""

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
    on_support,
    reverse_kl,
    support_sets,
)

from opd_lightning.objectives import DenseScores, ForwardKL, JensenShannon, Objective, ReverseKL


def accepted_objectives():
    """Every accepted combination of the factors (null standing for its default), at k = 3."""
    choices = {
        "support": ["sampled_token", *TOP_K, "full_vocabulary"],
        "normalization": ["renormalize", "tail", "none"],
        "divergence": [ReverseKL(), ForwardKL(), JensenShannon(0.3)],
        "estimator": ["direct", "score_function"],
        "weighting": [None, "teacher_probability", "uniform"],
        "weight_scale": [None, "raw"],
        "centered": [False, True],
        "importance": [None, "ppo"],
        "advantage_clip": [None, 0.5],
    }
    combinations = (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    return [objective for arguments in combinations if (objective := build(k=3, **arguments))]


ACCEPTED = accepted_objectives()


def assert_zero(tensor, atol=1e-13):
    torch.testing.assert_close(tensor, torch.zeros_like(tensor), atol=atol, rtol=0)


def test_nothing_is_learnt_from_a_teacher_that_agrees_whatever_the_accepted_settings():
    case = make_case().agreeing()
    assert len(ACCEPTED) > 500
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
        empty = {"intersection": apart, "symmetric_difference": alike}.get(objective.support)
        if empty is not None:
            assert (empty.losses(objective) == 0).all()
            assert (empty.gradient(objective) == 0).all()


@pytest.mark.parametrize(("support", "normalization"), DIRECT)
@pytest.mark.parametrize("divergence", REFERENCES, ids=repr)
def test_direct_losses_are_the_divergence_on_the_support(support, normalization, divergence):
    objective = build(support=support, k=4, normalization=normalization, divergence=divergence)
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
    objective = build(support=support, k=3, normalization=normalization, divergence=divergence)
    assert torch.autograd.gradcheck(lambda z: case.losses(objective, z), case.logits.clone().requires_grad_())


def explicit_score_function(case, objective, tokens, row, weight, reward):
    """-sum_v w(v) A(v) grad log p(v) of one position, from the one-hot form of grad log p."""
    order = sorted(tokens)
    weights = weight[order]
    if objective.weight_scale != "raw":
        weights = weights / weights.sum()
    advantages = reward(case.p[row], case.q[row])[order]
    if objective.centered:
        advantages = advantages - (weights * advantages).sum() / weights.sum()
    one_hot = torch.nn.functional.one_hot(torch.tensor(order), case.p.shape[-1]).double()
    return -((weights * advantages)[:, None] * (one_hot - case.p[row])).sum(0)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weight_scale", ["normalized", "raw"])
@pytest.mark.parametrize("weighting", ["student_probability", "teacher_probability", "uniform"])
@pytest.mark.parametrize("support", [*TOP_K, "full_vocabulary"])
def test_score_function_gradients_are_weighted_rewards(support, weighting, weight_scale, centered):
    rewards = {
        ReverseKL(): lambda p, q: q.log() - p.log(),
        ForwardKL(): lambda p, q: q / p - 1,
        JensenShannon(0.3): lambda p, q: -0.7 * (p / (0.3 * q + 0.7 * p)).log(),
    }
    case = make_case(seed=5)
    for divergence, reward in rewards.items():
        objective = Objective(
            support=support,
            k=16 if support == "full_vocabulary" else 4,
            normalization="none",
            divergence=divergence,
            estimator="score_function",
            weighting=weighting,
            weight_scale=weight_scale,
            centered=centered,
        )
        weights = {"student_probability": case.p, "teacher_probability": case.q, "uniform": torch.ones_like(case.p)}
        expected = [
            explicit_score_function(case, objective, tokens, row, weights[weighting][row], reward)
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
    return logits, scores, torch.tensor([0]), rollout


def slope(objective, log_ratio, advantage):
    """Gradient of the loss with respect to log p of the sampled token (half of it reaches the token's logit)."""
    logits, scores, ids, rollout = sampled_case(log_ratio, advantage)
    grad = gradient(lambda z: objective.token_losses(z, scores, ids, rollout), logits)
    return grad[0, 0].item() / 0.5


@pytest.mark.parametrize(("ratio", "used"), [(0.5, 0.5), (1.0, 1.0), (4.9, 4.9), (5.0, 5.0), (30.0, 5.0)])
def test_truncated_importance_is_capped(ratio, used):
    objective = Objective(support="sampled_token", estimator="score_function")
    assert slope(objective, math.log(ratio), -0.4) == pytest.approx(used * 0.4)


@pytest.mark.parametrize(
    ("ratio", "used"), [(0.19, 0.0), (0.21, 0.21), (1.0, 1.0), (4.9, 4.9), (5.1, 0.0), (30.0, 0.0)]
)
def test_masked_importance_leaves_out_what_is_too_far_off(ratio, used):
    objective = Objective(support="sampled_token", estimator="score_function", importance="masked")
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
def test_ppo_stops_at_the_clip_only_in_the_direction_of_the_advantage(ratio, advantage, expected):
    objective = Objective(
        support="sampled_token", estimator="score_function", importance="ppo", clip_low=0.2, clip_high=0.3
    )
    assert slope(objective, math.log(ratio), advantage) == pytest.approx(expected)
    logits, scores, ids, rollout = sampled_case(math.log(ratio), advantage)
    value = objective.token_losses(logits, scores, ids, rollout).item()
    assert value == pytest.approx(-min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage))


def test_advantages_are_clipped_before_they_are_centred():
    case = make_case()
    objective = Objective(estimator="score_function", centered=True, advantage_clip=0.3)
    clipped = (case.q.log() - case.p.log()).clamp(-0.3, 0.3)
    centred = clipped - (case.p * clipped).sum(-1, keepdim=True)
    torch.testing.assert_close(case.gradient(objective), -case.p * centred)
    sampled = Objective(support="sampled_token", estimator="score_function", advantage_clip=0.3)
    assert slope(sampled, 0.0, -2.0) == pytest.approx(0.3)


def test_temperatures_divide_the_logits_of_their_model():
    case = make_case()
    objective = Objective(student_temperature=0.5, teacher_temperature=2.0)
    p, q = (case.logits / 0.5).softmax(-1), (case.teacher_logits / 2.0).softmax(-1)
    torch.testing.assert_close(case.losses(objective), reverse_kl(p, q))
    expected = p * ((p / q).log() - reverse_kl(p, q)[:, None]) / 0.5
    torch.testing.assert_close(case.gradient(objective), expected)


@pytest.mark.parametrize("support", ["sampled_token", *TOP_K, "full_vocabulary"])
def test_a_tempered_objective_is_the_plain_one_on_tempered_logits(support):
    case = make_case()
    estimator = "score_function" if support == "sampled_token" else "direct"
    tempered = Objective(support=support, estimator=estimator, student_temperature=0.5, teacher_temperature=2.0)
    plain = Objective(support=support, estimator=estimator)
    divided = Case(case.logits / 0.5, case.teacher_logits / 2.0, case.response_ids, case.rollout_log_probs)
    torch.testing.assert_close(case.losses(tempered), divided.losses(plain))
    torch.testing.assert_close(case.gradient(tempered), divided.gradient(plain) / 0.5)


@pytest.mark.parametrize("support", ["sampled_token", "student_top_k", "full_vocabulary"])
def test_half_precision_logits_give_float32_losses(support):
    case = make_case(vocabulary=50)
    estimator = "score_function" if support == "sampled_token" else "direct"
    objective = Objective(support=support, estimator=estimator)
    rounded = case.logits.bfloat16()
    scores = DenseScores(case.q.log().float(), case.response_ids)

    def losses(logits):
        return objective.token_losses(logits, scores, case.response_ids, case.rollout_log_probs.float())

    assert losses(rounded).dtype == torch.float32
    torch.testing.assert_close(losses(rounded).double(), case.losses(objective, rounded.double()), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(losses(rounded), losses(rounded.float()), atol=0, rtol=0)
    assert gradient(losses, rounded).dtype == torch.bfloat16


def test_no_gradient_reaches_the_teacher_or_the_rollout():
    case = make_case()
    case.rollout_log_probs.requires_grad_()
    objective = Objective(support="sampled_token", estimator="score_function")
    case.losses(objective, case.logits.clone().requires_grad_()).sum().backward()
    assert case.rollout_log_probs.grad is None


def test_no_positions_give_no_losses():
    case = make_case(n=0)
    for objective in ACCEPTED[::7]:
        assert case.losses(objective).shape == (0,)
