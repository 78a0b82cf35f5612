"""Where problems come from: `DataSource` names a file or a hub data set, `load_problems` reads it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_lightning.interfaces import Message, Problem
from opd_lightning.interfaces.columns import MISSING, look_up, matches

Row = tuple[str, Mapping[str, Any]]  # place ("line 17"), columns

_HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class DataSource:
    """One data set and how to read it.

    Rows keep their place: the uid of a problem is ``name/split/row`` with the row counted from 0 in the whole file, so
    filters do not rename anything.

    Args:
        path: File ending in .jsonl, .json (a list of objects), .parquet or .csv (with a header line); a folder in hub
            format; or the name of a hub data set (``"openai/gsm8k"``). Text is UTF-8.
        name: Name in uids, mixtures and metrics; None takes the file's, or the folder's for files called train or test.
        question: Column with the question, as text or as a list of chat messages ending with the user's. Dots step
            into nested columns.
        answer: Column with the reference answer, text or number (``"reward_model.ground_truth"``).
        config: Configuration of a hub data set.
        split: Split of a hub data set; None is right when it has only one.
        where: Keep only rows whose column holds this value, or one of these values (``{"level": [1, 2]}``).
        max_prompt_characters: Leave out rows whose question is longer.
        limit: Keep only the first so many of the remaining rows.

    Raises:
        ValueError: A number is out of range, or a setting does not apply to the path.
    """

    path: str
    name: str | None = None
    question: str = "question"
    answer: str = "answer"
    config: str | None = None
    split: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    max_prompt_characters: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for setting in ("max_prompt_characters", "limit"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise ValueError(f"source.{setting}: expected an integer of at least 1, got {value}.")
        if Path(self.path).suffix.lower() in _READERS and (self.config or self.split):
            raise ValueError(
                f"source.split and source.config belong to hub data sets, but {self.path} is a file. Remove them (to"
                " choose rows by a column, use `where`)."
            )
        if self.name is not None and (not self.name or "/" in self.name):
            raise ValueError(f"source.name: expected a name without slashes, got {self.name!r}.")

    @property
    def label(self) -> str:
        """Name in uids, mixtures and metrics."""
        if self.name is not None:
            return self.name
        path = Path(self.path)
        if path.suffix.lower() not in _READERS:
            return path.name
        folder = path.resolve().parent.name
        return folder if path.stem in _SPLIT_NAMES and folder else path.stem


def load_problems(source: DataSource, split: str) -> list[Problem]:
    """Read a source: filtered rows as problems, with question and answer as they stand there.

    Args:
        source: What to read.
        split: The task's name for it, part of the uids.

    Raises:
        ValueError: The source cannot be read, a kept row has no usable question or answer, or no row is kept. The
            message names the file and the line or row.
    """
    rows = list(_read_rows(source))
    if not rows:
        raise ValueError(f"{source.path} is empty: expected at least one row with a question and an answer.")
    problems: list[Problem] = []
    for index, (place, row) in enumerate(rows):
        if source.limit is not None and len(problems) == source.limit:
            break
        if not matches(row, source.where):
            continue
        where = f"{source.path}, {place}"
        messages = _messages(_column(row, "question", source.question, where), f"{where}, column {source.question!r}")
        limit = source.max_prompt_characters
        if limit is not None and sum(len(message["content"]) for message in messages) > limit:
            continue
        answer = _answer(_column(row, "answer", source.answer, where), f"{where}, column {source.answer!r}")
        columns = {name: value for name, value in row.items() if name not in (source.question, source.answer)}
        problems.append(Problem(f"{source.label}/{split}/{index}", messages, answer, source.label, columns))
    if not problems:
        raise ValueError(_nothing_left(source, rows))
    return problems


def _column(row: Mapping[str, Any], setting: str, path: str, where: str) -> Any:
    value = look_up(row, path)
    if value is MISSING:
        raise ValueError(
            f"{where}: there is no column {path!r}; available: {', '.join(map(str, row)) or 'none'}. Name the right one"
            f" with source.{setting}."
        )
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected text or a list of chat messages, got {_shorten(value)}.")
    for message in value:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{where}: expected chat messages with a role and a text content, got {_shorten(message)}."
            )
    if not value or value[-1]["role"] != "user":
        raise ValueError(f"{where}: expected chat messages ending with the user's, got {_shorten(value)}.")
    if not value[-1]["content"].strip():
        raise ValueError(f"{where}: the question is empty. Leave such rows out, with source.where for example.")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _answer(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: expected text or a number as the reference answer, got {_shorten(value)}.")
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise ValueError(f"{where}: the reference answer is empty. Leave such rows out, with source.where for example.")
    return text


def _nothing_left(source: DataSource, rows: list[Row]) -> str:
    reasons = []
    for path in source.where:
        seen = {_shorten(value) for _, row in rows if (value := look_up(row, path)) is not MISSING}
        values = ", ".join(sorted(seen)[:8]) + (", ..." if len(seen) > 8 else "")
        columns = ", ".join(map(str, rows[0][1]))
        reasons.append(f"column {path!r} holds {values}" if seen else f"no column {path!r} (available: {columns})")
    if source.max_prompt_characters is not None:
        reasons.append(f"max_prompt_characters is {source.max_prompt_characters}")
    return f"{source.path}: the filters leave none of the {len(rows)} rows; {'; '.join(reasons)}."


def _shorten(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _read_rows(source: DataSource) -> Iterator[Row]:
    path = Path(source.path).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise ValueError(
                f"{path}: expected a file ending in {', '.join(_READERS)}, got {path.suffix or 'no ending'!r}."
            )
        yield from reader(path)
    elif reader is not None:
        raise ValueError(f"{path} does not exist. Relative paths start from {Path.cwd()}.")
    elif path.is_dir() or _HUB_NAME.fullmatch(source.path):
        yield from _read_hub(source)
    else:
        raise ValueError(f"{path} is neither a file, a folder nor the name of a hub data set.")


def _check_row(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with named columns, got {_shorten(row)}.")
    return row


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
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: expected one JSON object, but {error.msg} at character {error.colno}."
            ) from error
        yield f"line {number}", _check_row(row, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: expected valid JSON, but {error.msg} at character {error.colno}. One object"
            " per line goes into a file ending in .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {_shorten(rows)}.")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _check_row(row, f"{path}, row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            line = reader.line_num
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {line}: expected {len(reader.fieldnames or ())} cells, as in the header."
                )
            yield f"line {line}", row
    except csv.Error as error:
        raise ValueError(f"{path}, after line {line}: expected valid CSV, but {error}.") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, but {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", row


def _read_hub(source: DataSource) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source.path, source.config, split=source.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"{source.path}: no such file, and no data set could be loaded by that name: {error}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise ValueError(f"{source.path} has the splits {', '.join(data)}. Choose one with source.split.")
        data = next(iter(data.values()))
    for number, row in enumerate(data, start=1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
