"""From inspected rollouts to the rows of a record: plain values and the texts of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.diagnosis.templates import render_own
from opd_lightning.interfaces import Problem, Teacher, Tokenizer
from opd_lightning.reports.token_records import VALUES, Row
from opd_lightning.rollouts.inspection import InspectedRollout, TopTokens


class TokenRows:
    """Makes rows; the text of a token is looked up once, that of a prompt in every record.

    Args:
        tokenizer: The student's.
        teacher: Whose own template renders the prompts too, where its model runs in this process.
    """

    def __init__(self, tokenizer: Tokenizer, teacher: Teacher | None) -> None:
        self._tokenizer = tokenizer
        answerer = None if teacher is None else teacher.as_student()
        self._teacher_tokenizer = None if answerer is None else answerer[0].tokenizer
        self._texts: dict[int, tuple[str, bool]] = {}

    def rows(self, inspected: Iterable[InspectedRollout], step: int, kind: str, staleness: int | None) -> list[Row]:
        """One row for each rollout.

        Args:
            inspected: The rollouts.
            step: Steps trained before.
            kind: "own" or "fixed".
            staleness: Of the step's rollouts.
        """
        return [self._row(each) | {"step": step, "kind": kind, "staleness": staleness} for each in inspected]

    def _row(self, inspected: InspectedRollout) -> Row:
        rollout, num_tokens = inspected.rollout, len(inspected.rollout.response_ids)
        places = rollout.trained_positions
        wrote = torch.zeros(num_tokens, dtype=torch.bool)
        wrote[places] = True
        token_ids: list[int] = rollout.response_ids.tolist()
        prompt_ids: list[int] = rollout.prompt_ids.tolist()
        known = {name: _spread(inspected.values.get(name), places, num_tokens) for name in VALUES}
        return {
            "uid": rollout.problem.uid,
            "source": rollout.problem.source,
            "seed": rollout.seed,
            "reference": rollout.problem.answer,
            "reward": None if math.isnan(rollout.reward) else rollout.reward,
            "truncated": not rollout.finished,
            "num_tokens": num_tokens,
            "student_prompt": self._tokenizer.decode(prompt_ids, skip_special_tokens=False),
            "teacher_prompt": self._teacher_prompt(rollout.problem),
            "response": rollout.text,
            "prompt_ids": prompt_ids,
            "token_ids": token_ids,
            "texts": [self._text(token_id)[0] for token_id in token_ids],
            "is_special": [self._text(token_id)[1] for token_id in token_ids],
            "student_wrote": wrote.tolist(),
            **known,
            **self._lists("student", inspected.student, places, num_tokens),
            **self._lists("teacher", inspected.teacher, places, num_tokens),
        }

    def _lists(self, who: str, top: TopTokens | None, places: Tensor, num_tokens: int) -> dict[str, Any]:
        if top is None:
            return dict.fromkeys((f"{who}_top_ids", f"{who}_top_texts", f"{who}_top_log_probs"))
        ids = _place(top.ids.tolist(), places, num_tokens)
        return {
            f"{who}_top_ids": ids,
            f"{who}_top_texts": [None if row is None else [self._text(each)[0] for each in row] for row in ids],
            f"{who}_top_log_probs": _place(top.log_probs.tolist(), places, num_tokens),
        }

    def _teacher_prompt(self, problem: Problem) -> str | None:
        """The prompt as the teacher's own template makes it; None where that is not known."""
        if self._teacher_tokenizer is None or (ids := render_own(self._teacher_tokenizer, problem)) is None:
            return None
        # the ids are the same tokens on both sides, so either tokenizer may spell them out
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _text(self, token_id: int) -> tuple[str, bool]:
        """The text of a token inside a text, and whether it is a special token."""
        if token_id not in self._texts:
            once, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
            # some tokenizers drop the space before the first word of a text: the second one has it
            inside = twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once
            is_special = bool(once) and not self._tokenizer.decode([token_id])
            self._texts[token_id] = inside, is_special
        return self._texts[token_id]


def _spread(values: Tensor | None, places: Tensor, num_tokens: int) -> list[float | None] | None:
    """One number for each of T tokens; None where it is not known, and in place of all where none is."""
    if values is None:
        return None
    return _place([None if math.isnan(value) else value for value in values.tolist()], places, num_tokens)


def _place(values: Sequence[Any], places: Tensor, num_tokens: int) -> list[Any]:
    spread: list[Any] = [None] * num_tokens
    for place, value in zip(places.tolist(), values, strict=True):
        spread[place] = value
    return spread
