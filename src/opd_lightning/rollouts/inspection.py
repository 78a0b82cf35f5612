"""A close look at a few rollouts: for every token what both models expected there, for people to read.

More than the training step keeps: the likeliest tokens themselves. So a pass of its own, without gradients, over as few
rollouts as somebody will look at. Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opd_lightning.interfaces import (
    MicroBatch,
    Objective,
    ResponseTokens,
    Rollout,
    ScoreRequest,
    Student,
    Teacher,
    TeacherScores,
    TokenWeighting,
)
from opd_lightning.objectives import token_facts
from opd_lightning.objectives.logprobs import close_slots, full_log_probs
from opd_lightning.objectives.token_weights import weigh_tokens
from opd_lightning.objectives.top_tokens import top_tokens


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of N positions, likeliest first, on the CPU.

    Attributes:
        ids: int64 [N, K].
        log_probs: float32 [N, K], nats.
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class InspectedRollout:
    """What is known of the N tokens of a rollout that the student wrote.

    Attributes:
        rollout: The rollout.
        values: float32 [N] each, on the CPU, by name: the facts of docs/metrics.md, the log-probabilities of the
            sampled tokens (`student_log_prob`, `teacher_log_prob`), `token_weight`, `advantage`. What is not known is
            absent; NaN where it is not defined.
        student: The student's likeliest tokens.
        teacher: The teacher's; None where it does not tell.
    """

    rollout: Rollout
    values: dict[str, Tensor]
    student: TopTokens
    teacher: TopTokens | None


@dataclass(frozen=True)
class Look:
    """What is looked at.

    Attributes:
        objective: Of the training: its temperature, its advantages.
        weighting: Of the training; None where all tokens count the same.
        asked: What the teacher is asked; None without one.
        facts_k: Size of the lists that the facts compare.
        num_listed: Tokens of each list that are kept.
        with_advantages: Whether the objective's advantages are among the values.
    """

    objective: Objective
    weighting: TokenWeighting | None
    asked: ScoreRequest | None
    facts_k: int
    num_listed: int
    with_advantages: bool = True


def all_offered(teacher: Teacher, needed: ScoreRequest | None, num_listed: int) -> ScoreRequest:
    """Everything that a teacher tells.

    Args:
        teacher: Who is asked.
        needed: What the training asks it: a list of the same length may have been fetched already.
        num_listed: Tokens of its list that are wanted where the training asks for none.
    """
    offer = teacher.offer
    wanted = needed.top_k if needed is not None and needed.top_k else num_listed
    return replace(offer, top_k=min(wanted, offer.top_k), temperature=1.0 if needed is None else needed.temperature)


@torch.no_grad()
def inspect_rollouts(
    student: Student, model: nn.Module, micro_batches: Sequence[MicroBatch], teacher: Teacher | None, look: Look
) -> list[InspectedRollout]:
    """Look closely at the tokens of all micro-batches, in their order.

    The caller chooses eval mode and precision. One chunk's logits (`objective.chunk_tokens`) are the most that exist at
    once, in a few copies.

    Args:
        student: How the model runs.
        model: The loaded student.
        micro_batches: On its device.
        teacher: Who scores; None without one.
        look: What is looked at.
    """
    asked = look.asked
    scores = iter(teacher.score_all(micro_batches, asked)) if teacher is not None and asked is not None else None
    found: list[InspectedRollout] = []
    for batch in micro_batches:
        teacher_scores = next(scores) if scores is not None else None
        hidden, head, size = student.hidden_states(model, batch), student.head(model), look.objective.chunk_tokens
        parts = []
        for start in range(0, batch.num_tokens, size):
            rows = slice(start, min(start + size, batch.num_tokens))
            part = None if teacher_scores is None else teacher_scores.slice(rows.start, rows.stop)
            parts.append(_look_at_chunk(head(hidden[rows]), part, batch.tokens[rows], look))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if look.weighting is not None:
            columns["token_weight"] = weigh_tokens(look.weighting, columns, batch)
        found += _by_rollout(batch, columns)
    return found


def _look_at_chunk(
    logits: Tensor, teacher: TeacherScores | None, tokens: ResponseTokens, look: Look
) -> dict[str, Tensor]:
    """Columns of n tokens by name, [n] or [n, K]."""
    student = close_slots(full_log_probs(logits, look.objective.student_temperature))
    columns = token_facts(student, teacher, tokens, look.asked, look.facts_k)
    columns["student_log_prob"] = student.gather(-1, tokens.ids[:, None]).squeeze(-1)
    columns["student_top"], columns["student_top_ids"] = top_tokens(student, min(look.num_listed, student.shape[-1]))
    if teacher is None or look.asked is None:
        return columns
    columns["teacher_log_prob"] = close_slots(teacher.sampled())
    num_listed = look.num_listed if look.asked.full_vocabulary else min(look.num_listed, look.asked.top_k)
    if num_listed:
        ids, log_probs = teacher.topk(num_listed)
        columns |= {"teacher_top_ids": ids, "teacher_top": close_slots(log_probs)}
    if look.with_advantages and look.objective.request() is not None:
        advantages = look.objective.advantages(logits, teacher, tokens)
        if advantages is not None:
            columns["advantage"] = advantages
    return columns


def _by_rollout(batch: MicroBatch, columns: dict[str, Tensor]) -> list[InspectedRollout]:
    parts = {name: batch.by_rollout(values.cpu()) for name, values in columns.items()}
    lists = ("student_top", "student_top_ids", "teacher_top", "teacher_top_ids")
    return [
        InspectedRollout(
            rollout,
            {name: part[place].float() for name, part in parts.items() if name not in lists},
            TopTokens(parts["student_top_ids"][place], parts["student_top"][place].float()),
            TopTokens(parts["teacher_top_ids"][place], parts["teacher_top"][place].float())
            if "teacher_top" in parts
            else None,
        )
        for place, rollout in enumerate(batch.rollouts)
    ]
