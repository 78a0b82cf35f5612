"""Checks of constructor arguments that several classes share."""

from __future__ import annotations


def check_at_least(least: int, owner: str, **values: int | None) -> None:
    """Refuse numbers below `least`; None is no number.

    Raises:
        ValueError: One of them is; names it as ``owner.name``.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{owner}.{name}: expected an integer of at least {least}, got {value}.")
