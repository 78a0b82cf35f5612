"""Records of tokens on the disk, as `TokenRecorder` writes them and everybody may read them (docs/tokens.md).

One parquet file for each recorded step, one row for each rollout, lists with one entry for each of its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_lightning.whole_files import written_whole

if TYPE_CHECKING:
    import pyarrow

FOLDER = "tokens"
FORMAT = "opd_lightning tokens 1"
VALUES = (  # of single tokens, float32; null where unknown
    "student_log_prob",
    "teacher_log_prob",
    "sampled_log_ratio",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "token_weight",
    "advantage",
)
_METADATA = b"opd_lightning"
_STEP = re.compile(r"step=(\d+)\.parquet")
Row = dict[str, Any]


def find_records(folder: Path) -> Path:
    """The folder of the records of a run.

    Args:
        folder: That folder itself, or the run's.

    Raises:
        ValueError: There are none.
    """
    for place in (folder, folder / FOLDER):
        if steps_of(place):
            return place
    raise ValueError(
        f"records: {str(folder)!r} holds no records of tokens (expected step=*.parquet, there or in {FOLDER!r})."
        " Add the callback TokenRecorder to the run, or name another folder."
    )


def has_records(folder: Path) -> bool:
    """Whether `find_records` finds some."""
    return any(steps_of(place) for place in (folder, folder / FOLDER))


def steps_of(folder: Path) -> dict[int, Path]:
    """The files of a folder by their step, in order."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step=*.parquet"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def path_of(folder: Path, step: int) -> Path:
    """Where the record of a step lies."""
    return folder / f"step={step:06d}.parquet"


def write_record(folder: Path, step: int, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> int:
    """Write the record of one step, whole or not at all; one that is there is replaced. Returns its bytes.

    Args:
        folder: Of the records; made if need be.
        step: Steps that were trained before.
        rows: One for each rollout, with every column of the schema; NaN is not allowed, None is what is not known.
        header: What the file says about itself, beside its format.
    """
    import pyarrow
    import pyarrow.parquet

    metadata = {_METADATA: json.dumps({"format": FORMAT, **header}).encode()}
    table = pyarrow.Table.from_pylist([_storable(row) for row in rows], _schema().with_metadata(metadata))
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path_of(folder, step)) as file:
        pyarrow.parquet.write_table(table, file, compression="zstd")
        return file.tell()


def read_header(folder: Path) -> dict[str, Any]:
    """What the first record says about itself.

    Raises:
        ValueError: It is none of ours, or cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    path = next(iter(steps_of(find_records(folder)).values()))
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"records: {str(path)!r} cannot be read ({error}). Remove it, or copy it again.") from error
    header = json.loads(metadata.get(_METADATA, b"{}"))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"records: {str(path)!r} is no record of tokens (expected {FORMAT!r} in its metadata). Name the folder that"
            " TokenRecorder wrote."
        )
    return header


def read_record(path: Path, columns: Iterable[str] | None = None) -> list[Row]:
    """The rows of one file.

    Args:
        path: The file.
        columns: Only these; None is all.

    Raises:
        ValueError: It cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=None if columns is None else list(columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"records: {str(path)!r} cannot be read ({error}). Remove it, or copy it again.") from error
    rows: list[Row] = table.to_pylist()
    return rows


def _schema() -> pyarrow.Schema:
    import pyarrow

    text, flag, small = pyarrow.string(), pyarrow.bool_(), pyarrow.int32()
    numbers, ids, texts = (pyarrow.list_(kind) for kind in (pyarrow.float32(), small, text))
    columns = {
        "step": pyarrow.int64(),
        "kind": text,
        "uid": text,
        "source": text,
        "seed": pyarrow.int64(),
        "reference": text,
        "reward": pyarrow.float64(),
        "truncated": flag,
        "num_tokens": small,
        "staleness": small,
        "student_prompt": text,
        "teacher_prompt": text,
        "response": text,
        "prompt_ids": ids,
        "token_ids": ids,
        "texts": texts,
        "is_special": pyarrow.list_(flag),
        "student_wrote": pyarrow.list_(flag),
        **dict.fromkeys(VALUES, numbers),
    }
    for who in ("student", "teacher"):
        columns[f"{who}_top_ids"] = pyarrow.list_(ids)
        columns[f"{who}_top_texts"] = pyarrow.list_(texts)
        columns[f"{who}_top_log_probs"] = pyarrow.list_(numbers)
    return pyarrow.schema(columns)


def _storable(value: Any) -> Any:
    """The same with half characters spelt out: a surrogate without its other half is no UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {name: _storable(part) for name, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return [_storable(part) for part in value]
    return value
