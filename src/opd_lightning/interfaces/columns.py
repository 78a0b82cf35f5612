"""Columns of a row: found by dotted path, selected by conditions. Data sources and prompt selectors filter alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

MISSING = object()

_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column, or `MISSING`.

    A column of exactly this name wins; otherwise each dot steps into a nested mapping
    (``"reward_model.ground_truth"``) or to a place of a list, counted from 0 (``"answers.0"``).
    """
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            return MISSING
    return value


def matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether every named column meets its condition.

    A condition is a value (the column holds it), a list (it holds one of these values), or a mapping of which all
    entries must hold: ``{">=": 3, "<": 5}``, ``{"!=": "de"}``, ``{"!=": ["de", "fr"]}``, ``{"empty": false}``.

    Values are also compared as text, since a CSV file holds nothing else: ``level: 1`` selects "1". Larger and smaller
    compare numbers (also those written as text), otherwise text with text; what cannot be compared is not selected.
    Nothing, null, NaN, blank text and empty lists are empty. A row without the column meets ``{"empty": true}`` only.
    """
    return all(_meets(look_up(row, path), condition) for path, condition in where.items())


def check_where(where: Mapping[str, Any], owner: str) -> None:
    """Refuse conditions that `matches` does not know.

    Raises:
        ValueError: There is one; names it as a column of ``owner.where``.
    """
    for path, condition in where.items():
        if not isinstance(condition, Mapping):
            continue
        known = {**_COMPARISONS, "!=": None, "empty": None}
        if not condition or any(sign not in known for sign in condition):
            raise ValueError(
                f"{owner}.where: column {path!r}: expected a value, a list of values, or conditions out of"
                f" {', '.join(map(repr, known))} (such as {{'>=': 3}}), got {dict(condition)}."
            )
        for sign, bound in condition.items():
            if sign == "empty" and not isinstance(bound, bool):
                raise ValueError(f"{owner}.where: column {path!r}: expected empty: true or false, got {bound!r}.")
            if sign in _COMPARISONS and (isinstance(bound, bool) or not isinstance(bound, str | int | float)):
                raise ValueError(
                    f"{owner}.where: column {path!r}: expected a number or text after {sign}, got {bound!r}."
                )


def _meets(value: Any, condition: Any) -> bool:
    if isinstance(condition, Mapping):
        return all(_holds(value, sign, bound) for sign, bound in condition.items())
    return value is not MISSING and _is_one_of(value, condition)


def _holds(value: Any, sign: str, bound: Any) -> bool:
    if sign == "empty":
        return _is_empty(value) is bound
    if value is MISSING:
        return False
    if sign == "!=":
        return not _is_one_of(value, bound)
    left, right = as_number(value), as_number(bound)
    if left is not None and right is not None:
        return bool(_COMPARISONS[sign](left, right))
    return isinstance(value, str) and isinstance(bound, str) and bool(_COMPARISONS[sign](value, bound))


def _is_one_of(value: Any, wanted: Any) -> bool:
    choices = wanted if isinstance(wanted, list | tuple | set) else [wanted]
    return any(value == choice or str(value) == str(choice) for choice in choices)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is MISSING or value is None or (isinstance(value, list | tuple | Mapping) and not value)


def as_number(value: Any) -> float | None:
    """The number that a column holds, perhaps as text (a CSV file holds nothing else); None if it holds none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
