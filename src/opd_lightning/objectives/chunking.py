"""Sum an objective over many response tokens without ever holding all their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_lightning.interfaces import ScoreRequest, TeacherScores
from opd_lightning.objectives.dense_scores import DenseScores
from opd_lightning.objectives.logprobs import full_log_probs
from opd_lightning.objectives.objective import Objective
from opd_lightning.objectives.statistics import TokenStatistics, token_statistics

Projection = Callable[[Tensor], Tensor]


@dataclass
class ChunkedLoss:
    """What N response tokens cost.

    Attributes:
        loss_sum: Scalar with gradient: sum of the token losses, not divided by anything.
        token_losses: [N] detached.
        statistics: Detached; empty when no statistics were asked for.
    """

    loss_sum: Tensor
    token_losses: Tensor
    statistics: TokenStatistics


def sum_over_chunks(
    hidden: Tensor,
    projection: Projection,
    objective: Objective,
    teacher: TeacherScores,
    response_ids: Tensor,
    rollout_log_probs: Tensor,
    *,
    answers: ScoreRequest | None = None,
    statistics_k: int = 16,
) -> ChunkedLoss:
    """Turn hidden states into a loss, `objective.chunk_tokens` response tokens at a time.

    With more than one chunk, each chunk's logits are thrown away after the forward pass and recomputed in the backward
    pass: one chunk's logits are the most that exist at once, and a single backward pass collects the gradients of all
    chunks (of the hidden states and of a trainable projection, tied or not, under DDP as well). A single chunk is kept
    and not recomputed. Statistics come from the forward pass and are not recomputed. An empty batch gives a loss of 0
    that still reaches every parameter, so that no rank of a DDP group waits for it.

    Args:
        hidden: [N, H] final hidden states, with gradient.
        projection: Turns hidden states [n, H] into untempered float32 logits [n, V].
        objective: Gives the token losses.
        teacher: Scores of the N tokens.
        response_ids: int64 [N], the sampled tokens.
        rollout_log_probs: [N] their log-probabilities when they were drawn.
        answers: What the teacher was asked for; statistics are computed from that. None skips them.
        statistics_k: Size of the top-k lists of the statistics.
    """
    size = objective.chunk_tokens
    chunks = torch.split(hidden, size)
    recomputes = len(chunks) > 1 and torch.is_grad_enabled()
    statistics = TokenStatistics()
    losses = []
    for index, chunk in enumerate(chunks):
        rows = slice(index * size, min((index + 1) * size, hidden.shape[0]))
        work = _ChunkWork(
            projection,
            objective,
            teacher,
            rows,
            response_ids[rows],
            rollout_log_probs[rows],
            answers,
            statistics_k,
        )
        losses.append(checkpoint(work, chunk, use_reentrant=False) if recomputes else work(chunk))
        statistics.add(work.statistics)
    joined = torch.cat(losses)
    return ChunkedLoss(joined.sum(), joined.detach(), statistics)


@dataclass
class _ChunkWork:
    """Losses of one chunk; the first call also takes the statistics, later calls are recomputations."""

    projection: Projection
    objective: Objective
    teacher: TeacherScores
    rows: slice
    response_ids: Tensor
    rollout_log_probs: Tensor
    answers: ScoreRequest | None
    statistics_k: int
    statistics: TokenStatistics = field(default_factory=TokenStatistics)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.projection(hidden)
        answers, self.answers = self.answers, None
        # Sliced anew by every call: a slice may keep what it computed, and this object lives until the backward pass.
        teacher = self.teacher.slice(self.rows.start, self.rows.stop)
        if self.objective.request().full_vocabulary or (answers is not None and answers.full_vocabulary):
            # The objective and the statistics both ask for it, and a teacher may have to compute it from hidden states.
            with torch.no_grad():
                teacher = DenseScores(teacher.full(), self.response_ids)
        losses = self.objective.token_losses(logits, teacher, self.response_ids, self.rollout_log_probs)
        if answers is not None:
            self.statistics = token_statistics(
                full_log_probs(logits.detach(), self.objective.student_temperature),
                teacher,
                self.response_ids,
                self.rollout_log_probs,
                answers,
                self.statistics_k,
            )
        return losses
