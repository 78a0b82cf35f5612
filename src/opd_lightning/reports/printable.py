"""What models wrote, made safe for a terminal."""

from __future__ import annotations

import unicodedata

_DIRECTION_MARKS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # they turn the text around that follows


def printable(text: str) -> str:
    r"""The text with control characters spelt out (``\x1b``), except line breaks and tabs.

    A model's output may hold escape sequences, which a terminal would obey.
    """
    return "".join(character if _is_harmless(character) else _spelt_out(character) for character in text)


def _is_harmless(character: str) -> bool:
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and ord(character) not in _DIRECTION_MARKS


def _spelt_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
