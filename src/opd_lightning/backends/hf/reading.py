"""The student's answers in another model's tokens: which of its tokens mean the same, and where both may end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.interfaces import Rollout, Tokenizer
from opd_lightning.methods.simct import partition
from opd_lightning.objectives.joint_scores import Units


class Unreadable(Exception):
    """A text that cannot be aligned, and why."""


@dataclass(frozen=True)
class Reading:
    """A rollout in the teacher's tokens.

    Attributes:
        rollout: As the teacher reads it.
        num_tokens: N, tokens that the student wrote.
        cells: How many tokens of student and teacher each unit has, from the first one on.
        student_ids: The student's tokens.
    """

    rollout: Rollout
    num_tokens: int
    cells: list[tuple[int, int]]
    student_ids: list[int]


class Reader:
    """Reads the student's text with the teacher's tokenizer.

    Args:
        student: The one.
        teacher: The other.
        closing: What closes a response in either, as it is written there; None takes what they name.
    """

    def __init__(self, student: Tokenizer, teacher: HFTokenizer, closing: Sequence[str] | None) -> None:
        self.student, self.teacher = student, teacher
        self._own, self._other = student.token_bytes(), teacher.token_bytes()
        self.closing = _closing_ids(student, teacher, closing)
        self.partner = _shared(student.vocabulary, self._own, teacher.vocabulary, self._other)
        own, other = self.closing
        if own is not None and other is not None and own not in self.partner and other not in self.partner.values():
            self.partner[own] = other
        ids = sorted(self.partner)
        self.column = {token_id: place for place, token_id in enumerate(ids)}
        self.shared_ids = torch.tensor(ids), torch.tensor([self.partner[token_id] for token_id in ids])

    def read(self, text: str) -> tuple[list[int], list[bytes]]:
        """The teacher's tokens of a text, and their bytes; a space that it puts in front is not counted.

        Raises:
            Unreadable: They are not the text.
        """
        token_ids = self.teacher.encode(text)
        if unknown := [i for i in token_ids if i not in self._other]:
            raise Unreadable(f"it reads {self.teacher.name_of(unknown[0])!r}, which is no text, in {text[:40]!r}")
        pieces = [self._other[i] for i in token_ids]
        raw = text.encode()
        if pieces and pieces[0][:1] == b" " and b"".join(pieces) == b" " + raw:
            pieces[0] = pieces[0][1:]  # a token that is nothing but the space belongs to the first unit
        if b"".join(pieces) != raw:
            raise Unreadable(f"it reads {b''.join(pieces)[:40]!r} where the text is {raw[:40]!r}")
        return token_ids, pieces

    def align(self, rollout: Rollout) -> Reading:
        """The rollout in the teacher's tokens.

        Raises:
            Unreadable: It cannot be.
        """
        if rollout.student_wrote is not None:
            raise Unreadable("it has several turns, and only answers of one are read across")
        student_ids = rollout.response_ids.tolist()
        body = student_ids[:-1] if rollout.finished else student_ids
        if strange := [token_id for token_id in body if token_id not in self._own]:
            raise Unreadable(f"the student's token {strange[0]} is no text")
        own = [self._own[token_id] for token_id in body]
        token_ids, other = self.read(_text(b"".join(own), rollout.finished))
        cells = partition(own, other)
        if rollout.finished and (last := self._closing_of(student_ids[-1])) is not None:
            token_ids, cells = [*token_ids, last], [*cells, (1, 1)]
        return self._reading(rollout, token_ids, cells, student_ids)

    def nothing(self, rollout: Rollout) -> Reading:
        """The rollout without any text to compare."""
        return self._reading(rollout, [], [], rollout.response_ids.tolist())

    def _closing_of(self, token_id: int) -> int | None:
        return self.partner.get(token_id, self.closing[1])

    def _reading(
        self, rollout: Rollout, token_ids: list[int], cells: list[tuple[int, int]], student_ids: list[int]
    ) -> Reading:
        read = replace(
            rollout,
            prompt_ids=torch.tensor(self.teacher.render(rollout.problem.messages)),
            response_ids=torch.tensor(token_ids, dtype=torch.int64),
            log_probs=torch.full((len(token_ids),), torch.nan),
            student_wrote=None,
            extras={},
        )
        return Reading(read, rollout.num_trained, cells, student_ids)


def _text(raw: bytes, finished: bool) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if not finished and error.reason == "unexpected end of data":
            return raw[: error.start].decode()
        raise Unreadable(
            f"its bytes are no UTF-8 at byte {error.start}: {raw[error.start : error.start + 4]!r}"
        ) from None


def units_of(readings: Sequence[Reading], reader: Reader) -> Units:
    """Where the units of the student's tokens begin, for rollouts laid end to end on either side."""
    size = sum(reading.num_tokens for reading in readings)
    num_tokens, first_row, num_rows = ([0] * size for _ in range(3))
    column, joined = [-1] * size, [False] * size
    start = row = 0
    for reading in readings:
        teacher_ids = reading.rollout.response_ids.tolist()
        i = j = 0
        for own, other in reading.cells:
            place = start + i
            num_tokens[place], first_row[place], num_rows[place] = own, row + j, other
            joined[place + 1 : place + own] = [True] * (own - 1)
            token_id = reading.student_ids[i]
            if own == other == 1 and reader.partner.get(token_id) == teacher_ids[j]:
                column[place] = reader.column[token_id]
            i, j = i + own, j + other
        start, row = start + reading.num_tokens, row + len(teacher_ids)
    return Units(
        num_tokens=torch.tensor(num_tokens, dtype=torch.int64),
        first_row=torch.tensor(first_row, dtype=torch.int64),
        num_rows=torch.tensor(num_rows, dtype=torch.int64),
        column=torch.tensor(column, dtype=torch.int64),
        joined=torch.tensor(joined, dtype=torch.bool),
    )


def _shared(
    student: Mapping[str, int], own: Mapping[int, bytes], teacher: Mapping[str, int], other: Mapping[int, bytes]
) -> dict[int, int]:
    """The student's tokens with those of the teacher that mean the same: by name first, then by their bytes."""
    partner = {
        token_id: teacher[name]
        for name, token_id in student.items()
        if name in teacher and own.get(token_id) == other.get(teacher[name])
    }
    taken = set(partner.values())
    by_bytes = {text: i for i, text in sorted(other.items(), reverse=True) if text and i not in taken}
    for token_id, text in sorted(own.items()):
        if token_id not in partner and text in by_bytes:
            partner[token_id] = by_bytes.pop(text)
    return partner


def _closing_ids(
    student: Tokenizer, teacher: HFTokenizer, named: Sequence[str] | None
) -> tuple[int | None, int | None]:
    """What closes a response in either vocabulary; None where there is no such token.

    Raises:
        ValueError: A token that was named is in no vocabulary.
    """
    if named is None:
        own = student.closing_id if isinstance(student, HFTokenizer) else next(iter(student.stop_ids), None)
        return own, teacher.closing_id
    for name, who, tokenizer in zip(named, ("student", "teacher"), (student, teacher), strict=True):
        if name not in tokenizer.vocabulary:
            raise ValueError(
                f"teacher.closing_tokens: {name!r} is no token of the {who}. Give it as its vocabulary writes it."
            )
    return student.vocabulary[named[0]], teacher.vocabulary[named[1]]
