"""Candidate tokens of each position, and how both models are normalised on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.interfaces import ScoreRequest, TeacherScores
from opd_lightning.objectives.logprobs import LOG_ZERO

Support = Literal[
    "sampled_token",
    "student_top_k",
    "teacher_top_k",
    "intersection",
    "union",
    "symmetric_difference",
    "full_vocabulary",
]
Normalization = Literal["renormalize", "tail", "none"]


@dataclass(frozen=True)
class Candidates:
    """The tokens that are compared at each of n positions.

    Attributes:
        ids: int64 [n, K]; None stands for the whole vocabulary in order.
        teacher_log_probs: [n, K] teacher log-probabilities of them, in nats; [n, V] for the whole vocabulary.
        mask: bool [n, K], True where a slot counts; None when all do.
    """

    ids: Tensor | None
    teacher_log_probs: Tensor
    mask: Tensor | None = None


def request_scores(support: Support, k: int, temperature: float) -> ScoreRequest:
    """What the teacher must answer for a support.

    Args:
        support: Name of the support.
        k: Size of the top-k lists.
        temperature: Teacher temperature.
    """
    return ScoreRequest(
        top_k=k if support in ("teacher_top_k", "intersection", "union", "symmetric_difference") else 0,
        arbitrary_ids=support in ("student_top_k", "union", "symmetric_difference"),
        full_vocabulary=support == "full_vocabulary",
        temperature=temperature,
    )


@torch.no_grad()
def select_candidates(
    support: Support, k: int, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor
) -> Candidates:
    """Choose the candidate tokens of n positions; selecting carries no gradient.

    S_p and S_q are the k likeliest tokens of student and teacher. The intersection lives in the student's k slots with
    the others masked; union and symmetric difference have 2k slots, each token in one unmasked slot at most.

    Args:
        support: Name of the support.
        k: Size of the top-k lists, clipped to V.
        student_logits: [n, V], tempered or not: only the order matters.
        teacher: Scores of the same n positions.
        response_ids: int64 [n], the sampled tokens.
    """
    if support == "full_vocabulary":
        return Candidates(None, teacher.full())
    if support == "sampled_token":
        return Candidates(response_ids[:, None], teacher.sampled()[:, None])
    k = min(k, student_logits.shape[-1])
    if support == "teacher_top_k":
        return Candidates(*teacher.topk(k))
    student_ids = student_logits.topk(k, dim=-1).indices
    if support == "student_top_k":
        return Candidates(student_ids, teacher.at(student_ids))
    teacher_ids, teacher_top = teacher.topk(k)
    same = same_tokens(student_ids, teacher_ids)
    if support == "intersection":
        there = teacher_top[:, None, :].expand_as(same).masked_fill(~same, -math.inf).amax(-1)
        return Candidates(student_ids, there, same.any(2))
    if support == "union":
        student_mask = torch.ones_like(student_ids, dtype=torch.bool)
    else:
        assert support == "symmetric_difference", support
        student_mask = ~same.any(2)
    return Candidates(
        ids=torch.cat([student_ids, teacher_ids], dim=-1),
        teacher_log_probs=torch.cat([teacher.at(student_ids), teacher_top], dim=-1),
        mask=torch.cat([student_mask, ~same.any(1)], dim=-1),
    )


def same_tokens(first_ids: Tensor, second_ids: Tensor) -> Tensor:
    """Which entries of two id lists [n, K] and [n, L] are the same token: bool [n, K, L]."""
    return first_ids[:, :, None] == second_ids[:, None, :]


def normalize(log_probs: Tensor, mask: Tensor | None, normalization: Normalization) -> Tensor:
    """Normalise one model's log-probabilities on the candidates, differentiably.

    Args:
        log_probs: [n, K], normalised over the whole vocabulary.
        mask: bool [n, K], True where a slot counts; None when all do.
        normalization: "renormalize" divides by the mass of the candidates; "tail" appends one bucket with the mass of
            all other tokens; "none" leaves them as they are.

    Returns:
        [n, K], or [n, K + 1] with the bucket last. Masked slots are finite and meaningless. Of an empty row, "tail"
        leaves the bucket with mass 1.
    """
    if normalization == "none":
        return log_probs
    # Masked slots must be far below LOG_ZERO, or they would take part where a model gives nothing to the open ones.
    open_slots = log_probs.clamp(min=LOG_ZERO)
    if mask is not None:
        open_slots = open_slots.masked_fill(~mask, 10 * LOG_ZERO)
    log_mass = open_slots.logsumexp(-1, keepdim=True)
    if normalization == "renormalize":
        return open_slots - log_mass
    return torch.cat([open_slots, log1mexp(log_mass)], dim=-1)


def with_tail_slot(mask: Tensor | None) -> Tensor | None:
    """The mask of candidates plus a tail bucket, which always counts."""
    return None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)


def log1mexp(log_mass: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0: the logarithm of the remaining mass.

    Rounding may leave no mass, or a negative one. One machine epsilon is kept then, for student and teacher alike, so
    that the bucket's log-ratio stays finite. The two formulas are exact on their sides of x = -log 2.
    """
    epsilon = torch.finfo(log_mass.dtype).eps
    below = log_mass.clamp(max=-epsilon)
    near = below > -math.log(2)
    # Each branch sees a harmless value where the other is chosen: NaN gradients pass through torch.where.
    near_value = torch.log(-torch.expm1(torch.where(near, below, -1.0)))
    far_value = torch.log1p(-torch.exp(torch.where(near, -1.0, below)))
    return torch.where(near, near_value, far_value)
