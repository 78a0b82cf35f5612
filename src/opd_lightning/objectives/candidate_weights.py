"""Weights of the candidate tokens in the score-function estimator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd_lightning.objectives.logprobs import LOG_ZERO, close_slots

Weighting = Literal["student_probability", "teacher_probability", "uniform"]
WeightScale = Literal["normalized", "raw"]


def candidate_weights(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor | None,
    weighting: Weighting,
    scale: WeightScale,
) -> Tensor:
    """Weights [n, K] of the candidates, detached, 0 in masked slots (arXiv 2604.13016, reward weights).

    Args:
        student_log_probs: [n, K] log p of the candidates.
        teacher_log_probs: [n, K] log q of the candidates.
        mask: bool [n, K], True where a slot counts; None when all do.
        weighting: "student_probability" is p(v), the expectation under the current student; "teacher_probability" is
            q(v); "uniform" is 1 per candidate.
        scale: "normalized" makes the weights of each position sum to 1 (to 0 where no candidate is left); "raw" leaves
            them, so positions whose candidates hold little mass count less.
    """
    with torch.no_grad():
        if weighting == "uniform":
            log_weights = torch.zeros_like(student_log_probs)
        else:
            log_weights = student_log_probs if weighting == "student_probability" else teacher_log_probs
        closed = close_slots(log_weights.detach(), mask)
        if scale == "raw":
            return closed.exp()
        if mask is None:
            return closed.softmax(-1)
        return closed.masked_fill(~mask, 10 * LOG_ZERO).softmax(-1) * mask
