"""Losses, facts and gradients of many response tokens in one pass over them, one chunk's logits at a time.

The gradients of the hidden states and of the head are formed while a chunk's logits are there, so no logits are kept
and no head runs twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.interfaces import LinearHead, Objective, ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives.blocks import Block, Scratch
from opd_lightning.objectives.dense_scores import DenseScores
from opd_lightning.objectives.fact_readings import FactReadings
from opd_lightning.objectives.gradients import gradient_rule
from opd_lightning.objectives.head_products import (
    HeadGradients,
    in_surrounding_precision,
    write_logits,
    write_uncapped,
)

_ENTRIES_PER_BLOCK = 2**17  # logits for each core: a block's buffers stay near its cache, and calls stay few
_ENTRIES_PER_BLOCK_ON_GPU = 2**24
_BLOCKS_AT_ONCE = 2  # whose likeliest tokens are looked for together: logits stay in the cache, and calls stay few


@dataclass(frozen=True)
class Question:
    """What is asked about N response tokens.

    Attributes:
        objective: Gives the losses.
        teacher: Scores of the tokens; None without a teacher.
        tokens: The tokens.
        asked: What the teacher was asked for; facts are computed from that.
        facts_k: Size of the top-k lists of the facts; 0 computes none.
    """

    objective: Objective
    teacher: TeacherScores | None
    tokens: ResponseTokens
    asked: ScoreRequest | None
    facts_k: int


@dataclass(frozen=True)
class Wanted:
    """Which gradients are formed; those of the hidden states are always among them.

    Attributes:
        weight: That of the head's weight.
        bias: That of the head's bias.
        factors: [N], by which losses are multiplied before they are summed up in these two; None for 1.
    """

    weight: bool = False
    bias: bool = False
    factors: Tensor | None = None


class OnePass:
    """One pass; run it once.

    Args:
        question: What is asked about the tokens.
        hidden: [N, H] final hidden states.
        head: Turns hidden states into logits.
        wanted: Which gradients are formed; None forms none.
    """

    def __init__(self, question: Question, hidden: Tensor, head: LinearHead, wanted: Wanted | None) -> None:
        self._question = question
        self._head = in_surrounding_precision(head, hidden.device.type)
        self._hidden = hidden.detach().to(self._head.weight.dtype)
        self._wanted = wanted
        self._rule = gradient_rule(question.objective)
        dtype = torch.promote_types(self._head.weight.dtype, torch.float32)
        self._size = question.objective.chunk_tokens
        self._logits = torch.empty(min(self._size, len(hidden)), head.num_rows, dtype=dtype, device=hidden.device)
        requests = [question.objective.request(), question.asked if question.facts_k else None]
        self._needs_teacher = requests[0] is not None
        self._asks_teacher = any(each is not None for each in requests)
        is_whole = question.teacher is not None and (
            any(each is not None and each.full_vocabulary for each in requests)
            or (self._asks_teacher and question.teacher.hidden() is not None)
        )
        self._teacher_logits = torch.empty_like(self._logits) if is_whole else None
        is_cut = not self._rule.takes_whole_chunks
        self._block_rows = max(1, _block_entries(hidden.device) // head.num_rows) if is_cut else self._size
        self._scratch = Scratch(self._logits[: self._block_rows])
        self._losses: list[Tensor] = []
        asked = None if question.teacher is None else question.asked
        self._readings = FactReadings(asked, question.facts_k) if question.facts_k else None
        self.gradients: HeadGradients | None = None
        if wanted is not None:
            self.gradients = HeadGradients(self._head, hidden, wanted.weight, wanted.bias, self._rule.factor)

    @torch.no_grad()
    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [N] and facts [N] by name; afterwards `gradients` are there, if any were wanted."""
        teacher = self._question.teacher
        for rows in _cut_units(len(self._hidden), self._size, None if teacher is None else teacher.joined):
            self._run_chunk(rows)
        facts = {} if self._readings is None else self._readings.facts(self._question.tokens)
        return torch.cat(self._losses), facts

    def _run_chunk(self, rows: slice) -> None:
        hidden, tokens = self._hidden[rows], self._question.tokens[rows]
        logits = self._logits[: len(hidden)]
        write_logits(self._head, hidden, logits)
        teacher, whole, is_normalized = self._teacher_of(rows)
        for place in _cut(len(hidden), _BLOCKS_AT_ONCE * self._block_rows):
            if self._readings is not None:
                part = None if teacher is None else teacher.slice(place.start, place.stop)
                self._readings.begin(logits[place], None if whole is None else whole[place], part, tokens[place])
            for inner in _cut(place.stop - place.start, self._block_rows):
                at = slice(place.start + inner.start, place.start + inner.stop)
                block = Block(
                    logits[at],
                    self._question.objective.student_temperature,
                    None if whole is None else whole[at],
                    is_normalized,
                    self._scratch,
                )
                if self._readings is not None:  # before the gradient is written over the logits
                    self._readings.read(block, inner)
                self._finish_block(block, teacher, tokens, at)
        if self._readings is not None:
            self._readings.settle()
        if self.gradients is not None and self._wanted is not None:
            factors = self._wanted.factors
            self.gradients.add(logits, hidden, rows, None if factors is None else factors[rows])

    def _teacher_of(self, rows: slice) -> tuple[TeacherScores | None, Tensor | None, bool]:
        """The teacher's scores of a chunk, all of its logits where they are needed, and whether they are normalised."""
        if self._question.teacher is None or not self._asks_teacher:
            return None, None, False
        teacher = self._question.teacher.slice(rows.start, rows.stop)
        if self._teacher_logits is None:
            return teacher, None, False
        logits = self._teacher_logits[: rows.stop - rows.start]
        if teacher.write_logits(logits):
            return teacher, logits, False
        return teacher, teacher.full().to(logits), True

    def _finish_block(
        self, block: Block, teacher: TeacherScores | None, chunk_tokens: ResponseTokens, at: slice
    ) -> None:
        """Take the losses of a block at some rows of its chunk, and write their gradient over the logits."""
        scores, tokens = None, chunk_tokens
        if self._rule.reads_tokens:
            tokens = chunk_tokens[at]
            if teacher is not None and self._needs_teacher:
                is_whole = self._teacher_logits is not None and not self._question.objective.reads_members
                scores = DenseScores(block.log_q, tokens.ids) if is_whole else teacher.slice(at.start, at.stop)
        if self.gradients is None:
            self._losses.append(self._rule(block, scores, tokens, None))
        elif self._head.softcap is None:
            self._losses.append(self._rule(block, scores, tokens, block.logits))
        else:
            gradient = block.buffer("gradient")
            self._losses.append(self._rule(block, scores, tokens, gradient))
            write_uncapped(self._head.softcap, block.logits, gradient)


def _cut(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, one at least."""
    for start in range(0, max(num_rows, 1), size):
        yield slice(start, min(start + size, num_rows))


def _cut_units(num_rows: int, size: int, joined: Tensor | None) -> Iterator[slice]:
    """The same, ended earlier where a unit of several rows would be cut.

    Raises:
        ValueError: A unit alone is longer.
    """
    if joined is None:
        yield from _cut(num_rows, size)
        return
    is_inside, start = [*joined.tolist(), False], 0
    while start < max(num_rows, 1):
        stop = min(start + size, num_rows)
        while stop > start and is_inside[stop]:
            stop -= 1
        if stop == start and num_rows:
            raise ValueError(
                f"objective.chunk_tokens={size}: a unit of text has more tokens than that. Raise it, or leave it out."
            )
        yield slice(start, stop)
        start = max(stop, 1)


def _block_entries(device: torch.device) -> int:
    return _ENTRIES_PER_BLOCK_ON_GPU if device.type == "cuda" else _ENTRIES_PER_BLOCK * torch.get_num_threads()
