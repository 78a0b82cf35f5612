"""`say`: print for people while a progress bar is on the screen. Works in any Lightning project."""

from __future__ import annotations

import unicodedata

import rich
from lightning import Trainer
from rich.console import RenderableType
from tqdm import tqdm

_DIRECTION_MARKS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # they turn the text around that follows


def say(trainer: Trainer, *lines: RenderableType) -> None:
    """Print lines above the progress bar, whichever it is, on the first process; long lines are not broken."""
    if not trainer.is_global_zero:
        return
    console = rich.get_console()  # bars made with rich draw on this one
    with tqdm.external_write_mode():  # takes bars of tqdm away, if there are any, and puts them back
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


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
