"""Teacher scores across two tokenizers: on the tokens both have, and on the shortest text both can end on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import TeacherScores

Averaged = Literal["log_probs", "logits"]


@dataclass(frozen=True)
class SharedTokens:
    """The tokens that two vocabularies share.

    Attributes:
        student_ids: int64 [S].
        teacher_ids: int64 [S], theirs in the other vocabulary.
    """

    student_ids: Tensor
    teacher_ids: Tensor


@dataclass(frozen=True)
class Units:
    """Which of N student tokens begin a unit, a piece of text at whose ends both tokenizations have a boundary.

    Attributes:
        num_tokens: int64 [N], student tokens of the unit that begins here; 0 where none begins.
        first_row: int64 [N], the teacher's row of the unit that begins here; 0 where none does.
        num_rows: int64 [N], its tokens of the teacher; 0 where none begins.
        column: int64 [N], its place among the shared tokens; -1 where it is none of them, or none begins.
        joined: bool [N], whether the token is one unit with the token before it.
    """

    num_tokens: Tensor
    first_row: Tensor
    num_rows: Tensor
    column: Tensor
    joined: Tensor

    def __getitem__(self, rows: slice) -> Units:
        """Some of them."""
        return Units(*(values[rows] for values in self._values()))

    def to(self, device: torch.device) -> Units:
        """A copy on the device."""
        return Units(*(values.to(device) for values in self._values()))

    def _values(self) -> tuple[Tensor, ...]:
        return self.num_tokens, self.first_row, self.num_rows, self.column, self.joined

    @cached_property
    def starts(self) -> Tensor:
        """int64 [n]: the student tokens that begin a unit."""
        return self.num_tokens.nonzero().squeeze(-1)


class JointScores(TeacherScores):
    """A teacher's scores of text that the student has written in other tokens.

    Known are the scores at the beginnings of units (`at_units`); of single tokens only those that are a unit of one
    token in both vocabularies, the others are NaN.

    Args:
        response_ids: int64 [N], the student's tokens.
        teacher: Scores of the teacher's own M tokens of the same text.
        units: Where units begin.
        shared: The tokens that both have.
    """

    knows_full = False

    def __init__(self, response_ids: Tensor, teacher: TeacherScores, units: Units, shared: SharedTokens) -> None:
        self.response_ids = response_ids
        self.units = units
        self.shared = shared
        self.joined = units.joined
        self._teacher = teacher

    @override
    def slice(self, start: int, stop: int) -> JointScores:
        rows = slice(start, stop)
        return JointScores(self.response_ids[rows], self._teacher, self.units[rows], self.shared)

    @override
    def full(self) -> Tensor:
        raise AssertionError("a teacher with another tokenizer was asked for the student's vocabulary")

    @override
    def sampled(self) -> Tensor:
        known = self.units.column >= 0
        rows = self.units.first_row[known]
        told = torch.full((self.num_tokens,), torch.nan, device=self.response_ids.device)
        if len(rows):
            first = int(rows.min())
            told[known] = self._teacher.slice(first, int(rows.max()) + 1).sampled().float()[rows - first]
        return told

    def at_units(self, averaged: Averaged) -> Tensor:
        """Scores [n, S + 1] at the beginnings of n units: of the shared tokens, and last of the unit itself.

        Args:
            averaged: What is averaged over the tokens of a unit, "log_probs" or (untrue to the paper) raw "logits".
        """
        units, starts = self.units, self.units.starts
        first_rows, num_rows = units.first_row[starts], units.num_rows[starts]
        if not len(starts):
            return torch.zeros(0, len(self.shared.teacher_ids) + 1, device=self.response_ids.device)
        first, end = int(first_rows.min()), int((first_rows + num_rows).max())
        part = self._teacher.slice(first, end)
        scores = part.full() if averaged == "log_probs" else _logits(part)
        written = scores.gather(-1, part.response_ids[:, None]).squeeze(-1)
        rows = first_rows - first
        own = sums_of_runs(written, rows, num_rows) / num_rows
        return torch.cat([scores[rows[:, None], self.shared.teacher_ids], own[:, None]], dim=-1)


def sums_of_runs(values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Sums [n] of n runs of neighbours among the values."""
    longest = int(lengths.max()) if len(lengths) else 0
    offsets = torch.arange(longest, device=values.device)
    is_inside = offsets < lengths[:, None]
    places = torch.where(is_inside, starts[:, None] + offsets, 0)
    return torch.where(is_inside, values[places], 0.0).sum(-1)


def _logits(scores: TeacherScores) -> Tensor:
    hidden = scores.hidden()
    assert hidden is not None, "raw logits are known only where the teacher runs in this process"
    states, head = hidden
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    out = torch.empty(len(states), head.num_rows, dtype=dtype, device=states.device)
    has_written = scores.write_logits(out)
    assert has_written
    return out
