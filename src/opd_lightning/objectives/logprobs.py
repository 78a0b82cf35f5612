"""Log-probabilities of one chunk of logits: at ids, all of them, and their entropy.

Everything here works on a chunk [n, V] and in float32 (float64 stays float64): half-precision log-sum-exps lose the
small log-ratios that distillation is about.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_ZERO = -1000.0
"""Nats that stand for the logarithm of zero, so that 0 * log(0) is 0 and no gradient is NaN.

exp(LOG_ZERO) is exactly 0 in float32 and float64. A token with teacher probability 0 therefore costs 1000 nats times
its student probability instead of infinity.
"""


def temper(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Upcast half-precision logits to float32 and divide them by the temperature.

    Args:
        logits: [n, V], any floating type.
        temperature: Positive; 1 divides nothing.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1 else wide / temperature


def full_log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [n, V] of the whole vocabulary, in nats.

    Args:
        logits: [n, V] untempered logits.
        temperature: Divides the logits.
    """
    return torch.log_softmax(temper(logits, temperature), dim=-1)


def log_probs_at(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities at some ids, normalised over the whole vocabulary, in nats.

    Gathers the logits and subtracts their log-sum-exp: the [n, V] log-softmax is never formed.

    Args:
        logits: [n, V] untempered logits.
        token_ids: int64 [n, K], or [n] for one id per row.
        temperature: Divides the logits.

    Returns:
        The shape of `token_ids`.
    """
    tempered = temper(logits, temperature)
    ids = token_ids if token_ids.dim() == 2 else token_ids[:, None]
    log_probs = tempered.gather(-1, ids) - tempered.logsumexp(-1, keepdim=True)
    return log_probs.reshape(token_ids.shape)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy [n] in nats of full distributions.

    Args:
        log_probs: [n, V] normalised log-probabilities; -inf counts as probability 0.
    """
    return -(log_probs.exp() * log_probs.clamp(min=LOG_ZERO)).sum(-1)


def close_slots(log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Replace -inf and masked slots by `LOG_ZERO`; no gradient flows to what was replaced.

    Args:
        log_probs: [n, K].
        mask: bool [n, K], True where a slot counts; None when all do.
    """
    if mask is not None:
        log_probs = log_probs.masked_fill(~mask, LOG_ZERO)
    return log_probs.clamp(min=LOG_ZERO)


def clip_reward(reward: Tensor, bound: float | None) -> Tensor:
    """Clamp rewards to [-bound, bound]; None leaves them."""
    return reward if bound is None else reward.clamp(-bound, bound)
