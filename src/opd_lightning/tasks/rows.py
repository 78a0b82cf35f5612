"""Rows of a file or a hub data set, whatever its format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, Mapping[str, Any] | str]  # place ("line 17"), columns or else what is wrong with the row

_HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def is_file_name(path: str) -> bool:
    """Whether the path ends like a file that can be read here."""
    return Path(path).suffix.lower() in _READERS


def shorten(value: Any) -> str:
    """A value and its type, in few characters, for messages."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def read_rows(name: str, config: str | None = None, split: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file, or of a hub data set, in order.

    Args:
        name: The file; a folder in hub format; or the name of a hub data set.
        config: Configuration of a hub data set.
        split: Split of a hub data set; None is right when it has only one.

    Raises:
        ValueError: It cannot be read.
    """
    path = Path(name).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise ValueError(
                f"{path}: expected a file ending in {', '.join(_READERS)}, got {path.suffix or 'no ending'!r}."
            )
        yield from reader(path)
    elif reader is not None:
        raise ValueError(f"{path} does not exist. Relative paths start from {Path.cwd()}.")
    elif path.is_dir() or _HUB_NAME.fullmatch(name):
        yield from _read_hub(name, config, split)
    else:
        raise ValueError(f"{path} is neither a file, a folder nor the name of a hub data set.")


def _named_columns(row: Any) -> Mapping[str, Any] | str:
    return row if isinstance(row, dict) else f"expected an object with named columns, got {shorten(row)}."


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text, found byte 0x{content[error.start]:02x}. Convert the file."
        ) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _named_columns(json.loads(line))
        except (ValueError, RecursionError) as error:
            row = f"expected one JSON object, but {_json_fault(error)}."
        yield f"line {number}", row


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    # the other limits of Python's reader: digits of an integer, depth
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"{path}{place}: expected valid JSON, but {_json_fault(error)}. One object per line goes into a file ending"
            " in .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {shorten(rows)}.")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _named_columns(row)


def _read_csv(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line, limit = 1, csv.field_size_limit(max(len(text), csv.field_size_limit()))  # long cells are no fault of a file
    try:
        names = Counter(reader.fieldnames or ())
        if repeated := [name for name, count in names.items() if name and count > 1]:
            raise ValueError(f"{path}, line 1: several columns are called {repeated[0]!r}. Rename all but one of them.")
        for row in reader:
            line = reader.line_num
            whole = None not in row and None not in row.values()
            yield f"line {line}", row if whole else f"expected {len(reader.fieldnames or ())} cells, as in the header."
    except csv.Error as error:
        raise ValueError(f"{path}, after line {line}: expected valid CSV, but {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: of single cells
        raise ValueError(f"{path}: expected a parquet file, but {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _read_hub(name: str, config: str | None, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{name}: no such file, and no data set could be loaded by that name: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise ValueError(f"{name} has the splits {', '.join(data)}. Choose one with source.split.")
        data = next(iter(data.values()))
    for number, row in enumerate(data, start=1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
