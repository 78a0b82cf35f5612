"""What `loss_floor.py` compares with: the loss as it was before, and the chunked losses of TRL and Liger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_lightning.interfaces import LinearHead, Objective, ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives import DenseScores, full_log_probs, token_facts


def checkpointed(
    hidden: Tensor,
    head: LinearHead,
    objective: Objective,
    teacher: TeacherScores,
    tokens: ResponseTokens,
    asked: ScoreRequest | None,
    facts_k: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`compare_in_chunks` as it was at 6a97886: autograd over each chunk, which the backward pass computes again."""
    size = objective.chunk_tokens
    losses, facts = [], []

    def run(chunk: Tensor, rows: slice, first: list[bool]) -> Tensor:
        logits = head(chunk)
        with torch.no_grad():
            scores = DenseScores(teacher.slice(rows.start, rows.stop).full(), tokens.ids[rows])
        result = objective.token_losses(logits, scores, tokens[rows])
        if facts_k and first.pop():
            student = full_log_probs(logits.detach(), objective.student_temperature)
            facts.append(token_facts(student, scores, tokens[rows], asked, facts_k))
        return result

    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        losses.append(checkpoint(run, hidden[rows], rows, [False, True], use_reentrant=False))
    return torch.cat(losses), {name: torch.cat([each[name] for each in facts]) for name in (facts[0] if facts else ())}


def trl_loss(m: Any, beta: float) -> None:
    """TRL's chunked divergence, as its `DistillationTrainer` calls it."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        m.hidden[None], m.teacher_hidden[None], m.weight, m.teacher_weight, torch.ones(1, len(m.hidden)), beta
    )
    loss.backward()


def liger_loss(m: Any, beta: float) -> None:
    """Liger's fused linear JSD loss in plain torch, in the chunks of the other arms."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=m.case.chunk
    )
    loss(m.hidden, m.weight, m.teacher_hidden, m.teacher_weight, m.tokens.ids).backward()
