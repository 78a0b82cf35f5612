"""Files of answers: one row per answer, and a header that says who answered what and how.

JSONL files have the header beside them (`answers.jsonl.header.json`), parquet files inside, in their metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from opd_lightning.interfaces import Tokenizer

FORMAT = "opd_lightning answers 1"
ENDINGS = (".jsonl", ".parquet")
_METADATA = b"opd_lightning"
_ROWS_AT_ONCE = 256

Row = Mapping[str, Any]


def check_ending(setting: str, path: str | Path) -> None:
    """Refuse a file whose name does not say how it is written.

    Raises:
        ValueError: It ends otherwise.
    """
    if Path(path).suffix not in ENDINGS:
        raise ValueError(f"{setting}: expected a file ending in {' or '.join(ENDINGS)}, got {str(path)!r}.")


def header_path(path: Path) -> Path:
    """Where the header of a JSONL file lies."""
    return path.with_name(f"{path.name}.header.json")


def read_header(path: Path, form: str = FORMAT) -> dict[str, Any] | None:
    """The header of a file of answers; None when it has none, as files that others wrote.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    if path.suffix == ".parquet":
        text = (_open_parquet(path).schema_arrow.metadata or {}).get(_METADATA)
    else:
        text = header_path(path).read_bytes() if header_path(path).is_file() else None
    if text is None:
        return None
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its header is damaged ({error}). Make the file again, or restore both.") from error
    if not isinstance(header, dict) or header.get("format") != form:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"{path}: expected a header of the format {form!r}, got {found!r}. Make the file again.")
    return header


def read_answers(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield place ("line 3") and columns of every row, one after the other.

    Raises:
        ValueError: A row is no object with columns, or the file is no parquet.
    """
    if path.suffix == ".parquet":
        number = 0
        for batch in _open_parquet(path).iter_batches(_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected one JSON object ({error}). Mend or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object with named columns, got {line[:60]!r}.")
            yield f"line {number}", row


def write_parquet(rows: Iterator[Row], header: Mapping[str, Any], file: BinaryIO) -> None:
    """Write rows and header as parquet; the same rows give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    text, number, ids = pyarrow.string(), pyarrow.int64(), pyarrow.list_(pyarrow.int32())
    log_probs = pyarrow.list_(pyarrow.float32())
    scores = {
        "teacher_log_probs": log_probs,
        "teacher_ids": pyarrow.list_(ids),
        "teacher_top_log_probs": pyarrow.list_(log_probs),
    }
    schema = pyarrow.schema(
        {
            "uid": text,
            "messages": pyarrow.list_(pyarrow.struct({"role": text, "content": text})),
            "reference": text,
            "response": text,
            "reward": pyarrow.float64(),
            "finished": pyarrow.bool_(),
            "num_tokens": number,
            "seed": number,
            "sample": number,
            "attempt": number,
            "prompt_ids": ids,
            "response_ids": ids,
            "log_probs": log_probs,
            "student_wrote": pyarrow.list_(pyarrow.bool_()),
            **(scores if "scores" in header.get("settings", {}) else {}),
        },
        metadata={_METADATA: json.dumps(header).encode()},
    )
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        waiting: list[Row] = []
        for row in rows:
            waiting.append({name: _storable(value) for name, value in row.items()})
            if len(waiting) == _ROWS_AT_ONCE:
                writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
                waiting = []
        if waiting:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))


def digest_of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_values(values: Any) -> str:
    """Digest of plain values, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a file says about token ids: a digest of the vocabulary, and what the closing tokens are called."""
    stop_ids = set(tokenizer.stop_ids)
    names = {token_id: token for token, token_id in tokenizer.vocabulary.items() if token_id in stop_ids}
    return {
        "vocabulary": digest_of_values(sorted(tokenizer.vocabulary.items())),
        "stop_tokens": {str(token_id): names[token_id] for token_id in sorted(names)},
    }


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a parquet file, but {error}") from error


def _storable(value: Any) -> Any:
    """Half a character of a surrogate pair cannot be UTF-8; it is backslashed, as in JSON."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{name: _storable(inner) for name, inner in part.items()} for part in value]
    return value
