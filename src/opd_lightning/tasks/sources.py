"""Where problems come from: `DataSource` names a file or a hub data set, `load_problems` makes problems of its rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from opd_lightning.interfaces import Message, Problem
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.interfaces.columns import MISSING, check_where, look_up, matches
from opd_lightning.tasks.rows import Row, is_file_name, read_rows, shorten

_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_NUM_EXAMPLES = 3


class UnusableRow(ValueError):
    """A row of which no problem can be made; the message says why."""


@dataclass(frozen=True)
class DataSource:
    r"""One data set and how to read it.

    Rows keep their place: the uid of a problem is ``name/split/row`` with the row counted from 0 in the whole file, so
    filters do not rename anything.

    Args:
        path: File ending in .jsonl, .json (a list of objects), .parquet or .csv (with a header line); a folder in hub
            format; or the name of a hub data set (``"openai/gsm8k"``). Text is UTF-8.
        name: Name in uids, mixtures and metrics; None takes the file's, or the folder's for files called train or test.
        question: Column with the question, as text or as a list of chat messages ending with the user's. Dots step
            into nested columns. With braces, a text with columns in it (``"{Body} {Question}"``; a brace that is meant
            is doubled).
        answer: Column with the reference answer: text, a number, or a list of those that are all part of the answer
            (``"reward_model.ground_truth"``; ``"answers.0"`` takes the first of alternatives). None for tasks that need
            none.
        raw: The question is the prompt itself, character for character: no chat template, no system prompt, nothing
            added. For base models.
        config: Configuration of a hub data set.
        split: Split of a hub data set; None is right when it has only one.
        where: Keep only rows whose columns meet these conditions: a value, one of a list of values
            (``{"level": [1, 2]}``), or comparisons (``{"level": {">=": 3}, "answer": {"empty": false}}``); see
            `columns.matches`.
        max_prompt_characters: Leave out rows whose question is longer.
        limit: Keep only the first so many of the remaining rows.
        strict: Refuse a file with a row of which no problem can be made, instead of leaving the row out with a warning.

    Raises:
        ValueError: A setting cannot be understood, or does not apply to the path.
    """

    path: str
    name: str | None = None
    question: str = "question"
    answer: str | None = "answer"
    raw: bool = False
    config: str | None = None
    split: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    max_prompt_characters: int | None = None
    limit: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, "source", max_prompt_characters=self.max_prompt_characters, limit=self.limit)
        check_where(self.where, "source")
        _fields(self.question)
        if is_file_name(self.path) and (self.config or self.split):
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
        if not is_file_name(self.path):
            return path.name
        folder = path.resolve().parent.name
        return folder if path.stem in _SPLIT_NAMES and folder else path.stem


def load_problems(
    source: DataSource, split: str, read_answer: Callable[[str], str] | None = str.strip
) -> list[Problem]:
    """Read a source: filtered rows as problems.

    Rows of which no problem can be made are left out with a warning, unless `source.strict`.

    Args:
        source: What to read.
        split: The task's name for it, part of the uids.
        read_answer: Makes the reference of the text in the answer column, or raises `UnusableRow`; None reads none.

    Raises:
        ValueError: The source cannot be read, no row is left, or one cannot be used and `source.strict`. The message
            names the file and the line or row.
    """
    rows = list(read_rows(source.path, source.config, source.split))
    if not rows:
        raise ValueError(f"{source.path} is empty: expected at least one row with a question.")
    problems: list[Problem] = []
    faults: list[str] = []
    for index, (place, row) in enumerate(rows):
        if len(problems) == source.limit:
            break
        try:
            if problem := _read_problem(source, row, f"{source.label}/{split}/{index}", read_answer):
                problems.append(problem)
        except UnusableRow as fault:
            faults.append(f"{place}{fault}")
            if source.strict:
                raise ValueError(
                    f"{source.path}, {faults[0]} Mend the row, leave it out with source.where, or skip all such rows"
                    " with source.strict: false."
                ) from None
    if not problems:
        raise ValueError(_nothing_left(source, rows, faults))
    if faults:
        examples = "; ".join(fault.rstrip(".") for fault in faults[:_NUM_EXAMPLES])
        more = "; ..." if len(faults) > _NUM_EXAMPLES else ""
        warnings.warn(
            f"{source.path}: {len(faults)} of {len(rows)} rows cannot be used and are left out ({examples}{more})."
            " source.strict: true refuses them instead.",
            stacklevel=2,
        )
    return problems


def _read_problem(
    source: DataSource, row: Mapping[str, Any] | str, uid: str, read_answer: Callable[[str], str] | None
) -> Problem | None:
    """The problem in a row, or None for a row that the filters leave out."""
    if isinstance(row, str):
        raise UnusableRow(f": {row}")
    if not matches(row, source.where):
        return None
    messages = _messages(source, row)
    limit = source.max_prompt_characters
    if limit is not None and sum(len(message["content"]) for message in messages) > limit:
        return None
    answer = None
    if read_answer is not None and source.answer is not None:
        text = _answer(_column(row, "answer", source.answer), source.answer)
        try:
            answer = read_answer(text)
        except UnusableRow as fault:
            raise UnusableRow(f", column {source.answer!r}: {fault}") from None
    used = (source.question, source.answer if answer is not None else None)
    columns = {name: value for name, value in row.items() if name not in used}
    return Problem(uid, messages, answer, source.label, columns)


def _column(row: Mapping[str, Any], setting: str, path: str) -> Any:
    value = look_up(row, path)
    if value is MISSING:
        raise UnusableRow(
            f": there is no column {path!r}; available: {', '.join(map(str, row)) or 'none'}. Name the right one"
            f" with `{setting}`, beside the path in data.task."
        )
    return value


def _fields(question: str) -> list[str]:
    """Columns that the braces of a question name; none when it is the name of a column itself."""
    try:
        parts = [part[1:] for part in Formatter().parse(question) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"source.question: {question!r} has braces that do not fit: {error}.") from error
    if any(not name or form or conversion for name, form, conversion in parts):
        raise ValueError(
            f"source.question: expected names of columns in braces, such as '{{Body}} {{Question}}', got {question!r}."
        )
    return [str(name) for name, _, _ in parts]


def _question(source: DataSource, row: Mapping[str, Any]) -> Any:
    names = _fields(source.question)
    if not names:
        return _column(row, "question", source.question)
    values = {name: _column(row, "question", name) for name in names}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UnusableRow(f", column {name!r}: expected text or a number, got {shorten(value)}.")
    pieces = Formatter().parse(source.question)
    return "".join(text + ("" if name is None else str(values[name])) for text, name, _, _ in pieces)


def _messages(source: DataSource, row: Mapping[str, Any]) -> tuple[Message, ...]:
    place = f", column {source.question!r}"
    content = _question(source, row)
    if source.raw and not isinstance(content, str):
        raise UnusableRow(f"{place}: expected text, since source.raw is on, got {shorten(content)}.")
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if not isinstance(content, list):
        raise UnusableRow(f"{place}: expected text or a list of chat messages, got {shorten(content)}.")
    for message in content:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UnusableRow(
                f"{place}: expected chat messages with a role and a text content, got {shorten(message)}."
            )
    if not content or content[-1]["role"] != "user":
        raise UnusableRow(f"{place}: expected chat messages ending with the user's, got {shorten(content)}.")
    if not content[-1]["content"].strip():
        raise UnusableRow(f"{place}: the question is empty.")
    if source.raw:
        return ({"role": "raw", "content": content[0]["content"]},)
    return tuple({"role": message["role"], "content": message["content"]} for message in content)


def _answer(value: Any, path: str) -> str:
    parts = value if isinstance(value, list) and value else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | float | None):
            key = next(iter(part), None) if isinstance(part, Mapping) else None
            hint = "" if key is None else f" Dots step into it, such as source.answer: {path}.{key}."
            raise UnusableRow(
                f", column {path!r}: expected text, a number or a list of those as the reference answer, got"
                f" {shorten(value)}.{hint}"
            )
    texts = ["" if part is None or part != part else str(part).strip() for part in parts]
    if not all(texts):
        raise UnusableRow(f", column {path!r}: the reference answer is empty.")
    return ", ".join(texts)


def _nothing_left(source: DataSource, rows: list[Row], faults: list[str]) -> str:
    if faults:
        return (
            f"{source.path}: none of its {len(rows)} rows can be used. The first of {len(faults)} faults: {faults[0]}"
        )
    table = [row for _, row in rows if not isinstance(row, str)]
    reasons = []
    for path in source.where:
        seen = {shorten(value) for row in table if (value := look_up(row, path)) is not MISSING}
        values = ", ".join(sorted(seen)[:8]) + (", ..." if len(seen) > 8 else "")
        columns = ", ".join(map(str, table[0]))
        reasons.append(f"column {path!r} holds {values}" if seen else f"no column {path!r} (available: {columns})")
    if source.max_prompt_characters is not None:
        reasons.append(f"max_prompt_characters is {source.max_prompt_characters}")
    return f"{source.path}: the filters leave none of the {len(rows)} rows; {'; '.join(reasons)}."
