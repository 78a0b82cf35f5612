"""`say`: print for people while a progress bar is on the screen. Works in any Lightning project."""

from __future__ import annotations

import rich
from lightning import Trainer
from rich.console import RenderableType
from tqdm import tqdm


def say(trainer: Trainer, *lines: RenderableType) -> None:
    """Print lines above the progress bar, whichever it is, on the first process; long lines are not broken."""
    if not trainer.is_global_zero:
        return
    console = rich.get_console()  # bars made with rich draw on this one
    with tqdm.external_write_mode():  # takes bars of tqdm away, if there are any, and puts them back
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
