"""What a model writes as criteria and marks is looked at here before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opd_lightning.backends.vllm.answers import UnfitAnswer
from opd_lightning.backends.vllm.server.exchange import one_line

_HEAVIEST = 1e6


def read_rubric(reply: str, most: int) -> list[tuple[str, float]]:
    """Criteria and weights of a reply.

    Raises:
        UnfitAnswer: It has none, too many, or weights that are no positive numbers.
    """
    criteria = _json_of(reply, "criteria")
    if not 1 <= len(criteria) <= most:
        raise UnfitAnswer(f"expected 1 to {most} criteria, got {len(criteria)}")
    found = []
    for each in criteria:
        parts: Mapping[str, Any] = each if isinstance(each, Mapping) else {}
        text, weight = parts.get("text"), parts.get("weight")
        if not isinstance(text, str) or not text.strip():
            raise UnfitAnswer(f"expected a text in each criterion, got {one_line(str(each))[:80]}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= _HEAVIEST:
            raise UnfitAnswer(f"expected a positive number as weight, got {one_line(str(weight))[:80]}")
        found.append((text.strip(), float(weight)))
    return found


def read_marks(reply: str, num_criteria: int) -> list[int]:
    """Marks of a reply, 0 or 1 for each criterion.

    Raises:
        UnfitAnswer: They are not.
    """
    marks = _json_of(reply, "marks")
    if len(marks) != num_criteria:
        raise UnfitAnswer(f"expected {num_criteria} marks, got {len(marks)}")
    if strange := [mark for mark in marks if mark not in (0, 1)]:
        raise UnfitAnswer(f"expected marks 0 or 1, got {one_line(str(strange[0]))[:80]}")
    return [int(mark) for mark in marks]


def _json_of(reply: str, name: str) -> list[Any]:
    """The list of this name in the JSON object of a reply; words around it do not matter."""
    start, end = reply.find("{"), reply.rfind("}") + 1
    try:
        values = json.loads(reply[start:end])[name]
    except (ValueError, KeyError, RecursionError):
        raise UnfitAnswer(f"expected JSON with {name!r}, got {one_line(reply)[:80]!r}") from None
    if not isinstance(values, list):
        raise UnfitAnswer(f"expected a list of {name}, got {one_line(str(values))[:80]}")
    return values
