"""How one model's log-probabilities are normalised on some candidate tokens, and what it gives to all others."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.objectives.logprobs import LOG_ZERO

Normalization = Literal["renormalize", "tail", "none"]

LOG_UNKNOWN = math.log(1e-5)
"""Below it, a tail that is left over from float32 log-probabilities is mostly their rounding."""


def normalize(
    log_probs: Tensor, mask: Tensor | None, normalization: Normalization, log_tail: Tensor | None = None
) -> Tensor:
    """Normalise one model's log-probabilities on the candidates, differentiably.

    Args:
        log_probs: [n, K], normalised over the whole vocabulary.
        mask: bool [n, K], True where a slot counts; None when all do.
        normalization: "renormalize" divides by the mass of the candidates; "tail" appends one bucket with the mass of
            all other tokens; "none" leaves them as they are.
        log_tail: [n], the logarithm of that mass where it is known (`log_mass_outside`); None takes what the candidates
            leave of 1, of which float32 log-probabilities say nothing below about 1e-6.

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
    if normalization == "renormalize":
        return open_slots - open_slots.logsumexp(-1, keepdim=True)
    if log_tail is None:  # the sum and what it leaves in float64, or most digits of a small rest are lost once more
        log_tail = log1mexp(open_slots.double().logsumexp(-1)).to(open_slots)
    return torch.cat([open_slots, log_tail[:, None].clamp(min=LOG_ZERO)], dim=-1)


def log_mass_outside(log_probs: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logarithm of the mass of all tokens but the candidates, [n], to the last digits however small it is.

    Args:
        log_probs: [n, V], normalised.
        ids: int64 [n, K], the candidates.
        mask: bool [n, K], True where a slot counts; None when all do.
    """
    size = log_probs.shape[-1]
    columns = ids if mask is None else ids.masked_fill(~mask, size)  # a closed slot may name a token that is open
    inside = torch.zeros(len(ids), size + 1, dtype=torch.bool, device=ids.device).scatter_(-1, columns, True)
    log_mass = log_probs.masked_fill(inside[:, :-1], 10 * LOG_ZERO).logsumexp(-1)
    return torch.where(inside[:, :-1].any(-1), log_mass, 0.0)


def settle_unknown_tails(teacher: Tensor, student: Tensor) -> Tensor:
    """Take the student's tail for the teacher's where both are too small for the teacher's to be known.

    A teacher that lists its likeliest tokens leaves its tail to subtraction, and what is left of 1 is then rounding.

    Args:
        teacher: [n, K + 1] log-probabilities of the teacher, the bucket last.
        student: [n, K + 1], of the student.
    """
    tail, other = teacher[:, -1:], student[:, -1:].detach()
    unknown = (tail < LOG_UNKNOWN) & (other < LOG_UNKNOWN)
    return torch.cat([teacher[:, :-1], torch.where(unknown, other, tail)], dim=-1)


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
