"""Where a run writes, and whether it can: asked before the work, not after it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from lightning import Trainer


def check_folder(name: str, path: str | Path) -> None:
    """Raise a ValueError when files cannot be made in this folder; creates nothing that stays.

    Args:
        name: The setting, for the message.
        path: The folder; it need not exist yet.
    """
    if "://" in str(path):  # not on this machine's file system
        return
    place = _existing(Path(path))
    if not place.is_dir():
        raise ValueError(
            f"{name}: {str(path)!r} cannot be a folder, since {str(place)!r} is a file. Choose another one."
        )
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}: nothing can be written to {str(place)!r} ({error.strerror}). Choose another place for"
            f" {str(path)!r}, or make room or ask for permission there."
        ) from error


def check_file(name: str, path: str | Path) -> None:
    """Raise a ValueError when this file cannot be written; creates nothing that stays.

    Args:
        name: The setting, for the message.
        path: The file; an existing one will be overwritten.
    """
    if Path(path).is_dir():
        raise ValueError(f"{name}: expected a file to write, but {str(path)!r} is a folder. Add a file name.")
    check_folder(name, Path(path).absolute().parent)


def free_space(path: str | Path) -> str:
    """How much room there is in a folder, or where it would be made."""
    return f"{shutil.disk_usage(_existing(Path(path))).free / 2**30:.1f} GiB free"


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run alone: that of its first logger, else `default_root_dir`.

    Loggers without a folder of their own get `save_dir/name/version`, where ModelCheckpoint puts `checkpoints`.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger: Any = trainer.loggers[0]
    if getattr(logger, "log_dir", None):
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def _existing(path: Path) -> Path:
    """The innermost part of the path that is there."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
