"""Settings of runs by their dotted names, and where runs differ in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists of classes are numbered, other lists stay whole."""
    if isinstance(settings, list) and any(isinstance(part, dict) for part in settings):
        settings = {str(number): part for number, part in enumerate(settings)}
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    dot = f"{prefix}." if prefix else ""
    return {name: value for key, part in settings.items() for name, value in flat(part, f"{dot}{key}").items()}


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names whose values are not the same in all runs, each with what every run has; a dash for none."""
    names = dict.fromkeys(name for each in settings for name in each)
    found = {}
    for name in names:
        values = [shown(each[name]) if name in each else "-" for each in settings]
        if len(set(values)) > 1:
            found[name] = values
    return found


def shown(value: Any) -> str:
    """A value as YAML would write it, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return " ".join(str(value).split())
