"""Losses whose gradient estimates the gradient of a divergence: over candidates, or from the sampled token alone.

Rewards are taken from the current student's log-probabilities and detached, so the expectation of each gradient is that
of the divergence at the current weights.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.logprobs import close_slots

LARGEST_LOG_IMPORTANCE = 20.0
"""Bound on |log p - rollout log-probability| before the exponential."""


def clip_reward(reward: Tensor, bound: float | None) -> Tensor:
    """Clamp rewards to [-bound, bound]; None leaves them."""
    return reward if bound is None else reward.clamp(-bound, bound)


def candidate_losses(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    divergence: Divergence,
    *,
    centered: bool,
    advantage_clip: float | None,
) -> Tensor:
    """Score-function losses [n] over candidates: -sum_v w(v) sg[A(v)] log p(v).

    The expectation over tokens is taken analytically, so no importance ratio is involved. A is the divergence's reward,
    clipped first and centred second, so that centred advantages have a weighted mean of exactly 0.

    Args:
        student_log_probs: [n, K] log p with gradient.
        teacher_log_probs: [n, K] log q.
        mask: bool [n, K], True where a slot counts; None when all do.
        weights: [n, K] detached, 0 in masked slots.
        divergence: Gives the reward.
        centered: Subtract the weighted mean of the rewards of each position.
        advantage_clip: Bound on |reward|.
    """
    with torch.no_grad():
        student = close_slots(student_log_probs.detach(), mask)
        teacher = close_slots(teacher_log_probs, mask)
        advantages = clip_reward(divergence.reward(student, teacher), advantage_clip)
        if centered:
            total = weights.sum(-1, keepdim=True)
            mean = (weights * advantages).sum(-1, keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny)
            advantages = advantages - mean
        coefficients = -weights * advantages
    return (coefficients * close_slots(student_log_probs, mask)).sum(-1)


def sampled_token_losses(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    rollout_log_probs: Tensor,
    divergence: Divergence,
    *,
    importance: Literal["truncated", "masked", "ppo", "none"],
    importance_cap: float,
    clip_low: float,
    clip_high: float,
    advantage_clip: float | None,
) -> Tensor:
    """Score-function losses [n] of the sampled tokens, -sg[A] log p in expectation over what was sampled.

    "truncated" multiplies A by sg[min(ratio, cap)], ratio = p / p_rollout: it corrects each token for the difference
    between the engine that drew it and the student that trains on it; the cap bounds the variance and leaves a small
    bias. "ppo" is -min(ratio A, clip(ratio, 1 - low, 1 + high) A) (arXiv 1707.06347, Eq. 7): a token gets no gradient
    once its ratio has left the interval in the direction that A asks for. "masked" weights by the ratio as it is and
    leaves tokens out whose ratio is above the cap or below its inverse: such a token says more about the difference of
    the two models than about the teacher.

    Args:
        student_log_probs: [n] log p of the sampled tokens with gradient.
        teacher_log_probs: [n] log q of them.
        rollout_log_probs: [n] their log-probabilities when they were drawn.
        divergence: Gives the reward.
        importance: Which correction.
        importance_cap: Largest ratio of "truncated" and "masked".
        clip_low: How far below 1 the ratio of "ppo" may go.
        clip_high: How far above 1 the ratio of "ppo" may go.
        advantage_clip: Bound on |reward|.
    """
    student = close_slots(student_log_probs)
    with torch.no_grad():
        advantages = clip_reward(divergence.reward(student.detach(), teacher_log_probs), advantage_clip)
    if importance == "none":
        return -advantages * student
    log_ratio = (student - rollout_log_probs).clamp(-LARGEST_LOG_IMPORTANCE, LARGEST_LOG_IMPORTANCE)
    if importance == "truncated":
        return -log_ratio.detach().exp().clamp(max=importance_cap) * advantages * student
    ratio = log_ratio.exp()
    if importance == "masked":
        weight = ratio.detach() * (log_ratio.detach().abs() <= math.log(importance_cap))
        return -weight * advantages * student
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
