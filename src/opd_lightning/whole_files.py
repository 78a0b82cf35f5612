"""Files that are there whole or not at all: written beside their place, and then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path, ending: str = ".part") -> Iterator[BinaryIO]:
    """A file to write that takes its place when the block ends: who reads meanwhile finds the old one.

    It is on the disk before it gets its name, so a crash leaves no empty file. Where the block or the disk fails, what
    was there before stays, and what was begun is removed; only a kill leaves that, for the next one to write over.

    Args:
        path: Its place, in a folder that exists.
        ending: Of the name under which it is written.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    part = path.with_name(f"{path.name}{ending}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):  # a disk that can only be read refuses this too, and its reason must not be lost
            part.unlink(missing_ok=True)
