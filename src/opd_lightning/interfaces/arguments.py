"""Constructor arguments: checks that several classes share, and how an object says what it was built with."""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict, is_dataclass
from typing import Any


def check_at_least(least: int, owner: str, **values: int | None) -> None:
    """Refuse numbers below `least`; None is no number.

    Raises:
        ValueError: One of them is; names it as ``owner.name``.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{owner}.{name}: expected an integer of at least {least}, got {value}.")


def constructor_arguments(instance: object) -> dict[str, Any]:
    """What an object was built with, as plain values: its attributes with the names of its constructor's arguments.

    Arguments that a subclass takes as ``**kwargs`` are those of the class above it.

    Raises:
        ValueError: An argument was not kept as an attribute.
    """
    found: dict[str, Any] = {}
    for cls in type(instance).__mro__:
        if "__init__" not in vars(cls):
            continue
        _, *parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()  # without self
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if not hasattr(instance, parameter.name):
                raise ValueError(
                    f"{type(instance).__name__}: its argument {parameter.name!r} must be kept as"
                    f" self.{parameter.name}, so that a checkpoint can say how to build it again."
                )
            value = getattr(instance, parameter.name)
            is_settings = is_dataclass(value) and not isinstance(value, type)
            found.setdefault(parameter.name, asdict(value) if is_settings else copy.deepcopy(value))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found
