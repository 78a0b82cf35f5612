"""Losses and facts of many response tokens without ever holding all their logits."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_lightning.interfaces import LinearHead, Objective, ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives.dense_scores import DenseScores
from opd_lightning.objectives.facts import token_facts
from opd_lightning.objectives.logprobs import full_log_probs


@dataclass(frozen=True)
class TokenResults:
    """What N response tokens cost, and what is known about them.

    Attributes:
        losses: [N] with gradient, nats; not weighted, not divided by anything.
        facts: float32 [N] each, without gradient, by name; empty when none were asked for.
    """

    losses: Tensor
    facts: dict[str, Tensor]


def compare_in_chunks(
    hidden: Tensor,
    head: LinearHead,
    objective: Objective,
    teacher: TeacherScores | None,
    tokens: ResponseTokens,
    *,
    asked: ScoreRequest | None = None,
    facts_k: int = 0,
) -> TokenResults:
    """Turn hidden states into losses, `objective.chunk_tokens` response tokens at a time.

    With more than one chunk, each chunk's logits are thrown away after the forward pass and recomputed in the backward
    pass: one chunk's logits are the most that exist at once, and a single backward pass collects the gradients of all
    chunks (of the hidden states and of a trainable head, tied or not, under DDP as well). A single chunk is kept and
    not recomputed. Facts come from the forward pass and are not recomputed. An empty batch gives losses that still
    reach every parameter, so that no rank of a DDP group waits for it.

    Args:
        hidden: [N, H] final hidden states, with gradient.
        head: Turns hidden states into untempered float32 logits.
        objective: Gives the token losses.
        teacher: Scores of the N tokens; None without a teacher.
        tokens: The N tokens.
        asked: What the teacher was asked for; facts are computed from that.
        facts_k: Size of the top-k lists of the facts; 0 computes none.
    """
    size = objective.chunk_tokens
    chunks = torch.split(hidden, size)
    recomputes = len(chunks) > 1 and torch.is_grad_enabled()
    losses: list[Tensor] = []
    facts: dict[str, list[Tensor]] = defaultdict(list)
    for index, chunk in enumerate(chunks):
        rows = slice(index * size, min((index + 1) * size, hidden.shape[0]))
        work = _ChunkWork(head, objective, teacher, rows, tokens[rows], asked, facts_k)
        losses.append(checkpoint(work, chunk, use_reentrant=False) if recomputes else work(chunk))
        for name, values in work.facts.items():
            facts[name].append(values)
    return TokenResults(torch.cat(losses), {name: torch.cat(parts) for name, parts in facts.items()})


@dataclass
class _ChunkWork:
    """Losses of one chunk; the first call also takes the facts, later calls are recomputations."""

    head: LinearHead
    objective: Objective
    teacher: TeacherScores | None
    rows: slice
    tokens: ResponseTokens
    asked: ScoreRequest | None
    facts_k: int
    facts: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        facts_k, self.facts_k = self.facts_k, 0
        # Sliced anew by every call: a slice may keep what it computed, and this object lives until the backward pass.
        teacher = None if self.teacher is None else self.teacher.slice(self.rows.start, self.rows.stop)
        request = self.objective.request()
        requests = (request, self.asked if facts_k else None)
        if teacher is not None and any(each is not None and each.full_vocabulary for each in requests):
            # The objective and the facts both ask for it, and a teacher may have to compute it from hidden states.
            with torch.no_grad():
                teacher = DenseScores(teacher.full(), self.tokens.ids)
        losses = self.objective.token_losses(logits, teacher if request is not None else None, self.tokens)
        if facts_k:
            student = full_log_probs(logits.detach(), self.objective.student_temperature)
            self.facts = token_facts(student, teacher, self.tokens, self.asked, facts_k)
        return losses
