"""Checkpoint files: fetched from wherever they lie, and read only while they are what was written.

torch writes a checksum (CRC-32) of every part of a file and never looks at it: a flipped bit makes a weight like any
other. Here all are checked before anything is believed, which costs one more reading of the file (about 1 s per GB).
"""

from __future__ import annotations

import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from opd_lightning.interfaces.addresses import without_secrets

_DAMAGE = (  # what zipfile says of archives in which any bit may be wrong
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
_FOLDER = 0x10  # the bit of a part's attributes that says so
_SILENCE = 60.0  # seconds in which a server may send nothing


def is_remote(path: str | Path) -> bool:
    """Whether it is an address and not a path."""
    return "://" in str(path)


def without_scheme(path: str) -> str:
    """Turn an address on this machine (``file:///runs/last.ckpt``) into a path; other addresses stay.

    Raises:
        ValueError: Nothing is known that reads such an address.
        ImportError: What reads it is not installed.
    """
    if not is_remote(path):
        return path
    system, place = _open_system(path)
    return str(place) if isinstance(system, LocalFileSystem) else path


@contextmanager
def fetched(path: str | Path) -> Iterator[Path]:
    """The file itself, or a copy of one that lies elsewhere; the copy is gone afterwards.

    Raises:
        ValueError: There is no such address.
        OSError: It cannot be fetched.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        copy = Path(folder, "fetched.ckpt")
        _fetch(str(path), copy)
        yield copy


def _fetch(address: str, copy: Path) -> None:
    system, place = _open_system(address)
    shown = without_secrets(address)
    from aiohttp import ClientError  # what fsspec lets through of http

    try:
        system.get_file(place, str(copy))
    except FileNotFoundError as error:
        raise ValueError(f"ckpt_path: there is no {shown!r}. Check the address.") from error
    except (OSError, ClientError) as error:
        reason = without_secrets(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise OSError(
            f"ckpt_path: {shown!r} cannot be fetched into {str(copy.parent.parent)!r} ({reason}). Try again, or"
            " download it and name the file."
        ) from error


def _open_system(address: str) -> tuple[AbstractFileSystem, str]:
    options: dict[str, Any] = {}
    if address.startswith("http"):
        from aiohttp import ClientTimeout  # by default a download may take five minutes in all

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)}
    try:
        system, place = url_to_fs(address, **options)
    except ValueError as error:
        message = f"ckpt_path: {address!r} cannot be read: {error}. Download it and name the file."
        raise ValueError(without_secrets(message)) from error
    return system, str(place)


def check_checkpoint_file(path: str | Path, name: str | Path | None = None) -> None:
    """Refuse a file that is absent, no checkpoint, or not what was written; reads all of it.

    Args:
        path: The file.
        name: What the user calls it, if that is something else.

    Raises:
        ValueError: It is; the message names the newest checkpoint beside it that is whole.
    """
    path, name = Path(path), without_secrets(str(name or path))
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" Checkpoints there: {', '.join(siblings)}." if siblings else ""
        raise ValueError(f"ckpt_path: no file {name!r}.{hint}")
    if (path / "config.json").exists():
        raise ValueError(f"ckpt_path: {name!r} is a model folder, not a checkpoint. Set student.path to it instead.")
    if path.is_dir():
        raise ValueError(
            f"ckpt_path: {name!r} is a folder; expected one file, such as last.ckpt, or a folder that FSDP2Strategy"
            " wrote (with whole.ckpt in it). What other strategies write as folders is not read: it can run code."
        )
    if (damage := find_damage(path)) is not None:
        raise ValueError(_refusal(path, name, damage))


def load_plain(path: Path, name: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a whole file, tensors and plain values only: what a checkpoint brings along is never run.

    Args:
        path: The file.
        name: What the user calls it.
        map_location: As `torch.load` has it.
        mmap: Read tensors from the disk only when they are used.

    Raises:
        ValueError: It holds other objects too, or is no checkpoint.
    """
    name = without_secrets(str(name))
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt_path: {name!r} holds more than tensors and plain values, and to read such objects is to run"
            " what they say. They are not read; use a checkpoint that `fit` wrote."
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:  # an archive of something else
        raise ValueError(_refusal(path, name, "cut short or not a checkpoint")) from error
    if not isinstance(content, dict):
        raise ValueError(f"ckpt_path: {name!r} is not a checkpoint; it holds a {type(content).__name__}.")
    return content


def find_damage(path: Path) -> str | None:
    """What is wrong with the archive, as the end of a sentence; None if every part has its checksum."""
    with path.open("rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                return "cut short or not a checkpoint"
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                # No checksum guards these, and torch believes them: it reads beyond a part that is said to be longer,
                # and leaves memory as it is for one that is said to be a folder.
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                    return "damaged or not a checkpoint: torch compresses nothing"
                if any(part.file_size != part.compress_size or part.external_attr & _FOLDER for part in parts):
                    return "damaged: its table of contents makes no sense"
                wrong = archive.testzip()
        except _DAMAGE:
            return "damaged: its table of contents makes no sense"
    return None if wrong is None else f"damaged: the checksum of its part {wrong!r} does not hold"


def _refusal(path: Path, name: str, damage: str) -> str:
    beside = [] if is_remote(name) else [other for other in path.parent.glob("*.ckpt") if other.is_file()]
    others = [other for other in beside if other.resolve() != path.resolve()]
    newest_first = sorted(others, key=lambda other: other.stat().st_mtime, reverse=True)
    whole = next((other for other in newest_first if find_damage(other) is None), None)
    if whole is not None:
        remedy = f"Use {str(whole)!r}, the newest beside it that is whole."
    elif is_remote(name):
        remedy = "Fetch it again, or use an earlier one."
    else:
        remedy = "No other checkpoint beside it is whole: use one from elsewhere, or start again."
    return f"ckpt_path: {name!r} ({path.stat().st_size} bytes) is {damage}. {remedy}"
