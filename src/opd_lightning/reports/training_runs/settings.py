"""Settings of runs by their dotted names, and where runs differ in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def readable(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names: arguments right under the name of their class, classes in lists by their names.

    ``callbacks: [{class_path: a.B, init_args: {c: 1}}]`` becomes ``callbacks.B: a.B`` and ``callbacks.B.c: 1``, so that
    one more callback in one of two runs does not make all that follow it differ.
    """
    if isinstance(settings, list) and any(isinstance(part, dict) for part in settings):
        by_name: dict[str, Any] = {}
        for number, part in enumerate(settings):
            path = part.get("class_path") if isinstance(part, dict) else None
            name = path.rpartition(".")[2] if isinstance(path, str) else str(number)
            by_name[name if name not in by_name else f"{name}#{number}"] = part
        settings = by_name
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    own = {}
    if isinstance(settings.get("class_path"), str) and prefix:
        own = {prefix: settings["class_path"]}
        settings = {key: part for key, part in settings.items() if key not in ("class_path", "init_args")} | (
            settings.get("init_args") or {}
        )
    dot = f"{prefix}." if prefix else ""
    return own | {name: each for key, part in settings.items() for name, each in readable(part, f"{dot}{key}").items()}


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
