"""Columns of a row: found by dotted path, selected by value. Data sources and prompt selectors filter alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MISSING = object()


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column, or `MISSING`.

    A column of exactly this name wins; otherwise each dot steps into a nested mapping
    (``"reward_model.ground_truth"``).
    """
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether every named column holds the wanted value, or one of the wanted values when a list is given.

    Values are also compared as text, since a CSV file holds nothing else: ``level: 1`` selects "1". A row without
    the column is not selected.
    """
    for path, wanted in where.items():
        value = look_up(row, path)
        choices = wanted if isinstance(wanted, list | tuple | set) else [wanted]
        if value is MISSING or not any(value == choice or str(value) == str(choice) for choice in choices):
            return False
    return True
