"""Read the folder of a run: `metrics.csv`, `config.yaml`, and the marks of held-out problems where they were kept.

Steps count the optimiser steps that the weights have made. Lightning numbers rows otherwise: what training logs in its
first step has step 0, which is where the weights of its rollouts are, but a validation after it has step 0 as well, and
so has one before it. The first at step 0 is taken for the latter, unless training logged that step before.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.reports.token_records import find_records, has_records
from opd_lightning.reports.training_runs.settings import readable

RECORDER = "trainer.callbacks.TokenRecorder"
METRICS, CONFIG, MARKS = "metrics.csv", "config.yaml", "held_out_marks.jsonl"
DEEPEST = 5  # default_root_dir/mlruns/EXPERIMENT/RUN/...

Series = Mapping[int, float]


@dataclass(frozen=True)
class Run:
    """What one run left.

    Attributes:
        label: Tells it apart from the others shown.
        folder: Where it is.
        series: By metric: its value by step.
        settings: By dotted name; empty where there is no `config.yaml`.
        marks: By step of a validation: the mean mark of each held-out problem.
        notes: What a reader has to know of these files.
    """

    label: str
    folder: Path
    series: Mapping[str, Series]
    settings: Mapping[str, Any]
    marks: Mapping[int, Mapping[str, float]]
    notes: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        """Optimiser steps made, as far as anything of them was logged."""
        return max((s + name.startswith("train/") for name, values in self.series.items() for s in values), default=0)


def read_runs(places: Sequence[str | Path]) -> list[Run]:
    """Read some runs, each of which may have gone on from the checkpoint of an earlier one.

    Raises:
        ValueError: A folder is not there, holds no run or several, or a file in it cannot be read.
    """
    folders = [find_folder(place) for place in places]
    for place, folder in zip(places, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"runs: {str(place)!r} is named twice. Name different runs.")
    return [read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def find_folder(place: str | Path) -> Path:
    """The one folder at or below a place that holds a run's metrics; of runs that continue each other, the last."""
    root = Path(place).expanduser()
    if not root.is_dir():
        raise ValueError(f"runs: there is no folder {str(place)!r}. Expected that of a run, with {METRICS} in it.")
    patterns = ("*/" * depth + METRICS for depth in range(DEEPEST + 1))
    found = sorted((path.parent for pattern in patterns for path in root.glob(pattern)), key=_by_number)
    if not found:
        raise ValueError(
            f"runs: no {METRICS} in {str(place)!r} or below. Expected the folder of a run of 'opd-lightning fit', or of"
            " any Trainer with a CSVLogger; other loggers keep their numbers elsewhere."
        )
    earlier = {before for folder in found if (before := _earlier_part(folder, _settings(folder))) is not None}
    last = [folder for folder in found if folder.resolve() not in earlier]
    if len(last) != 1:
        names = ", ".join(repr(str(folder)) for folder in last[:5]) + (", ..." if len(last) > 5 else "")
        raise ValueError(f"runs: {str(place)!r} holds {len(last)} runs: {names}. Name one of them, or each by itself.")
    return last[0]


def read_run(folder: Path, label: str) -> Run:
    """Read one run, with the runs that it went on from as far as they are there."""
    series, notes = read_metrics(folder / METRICS)
    settings = _settings(folder)
    marks, more = read_marks(folder / MARKS)
    notes += more
    before = _earlier_part(folder, settings)
    if before is not None:
        first = _first_step(series)
        earlier = read_run(before, label)
        kept = {name: {s: v for s, v in old.items() if s <= first} for name, old in earlier.series.items()}
        series = {
            name: dict(sorted({**kept.get(name, {}), **series.get(name, {})}.items())) for name in {**kept, **series}
        }
        marks = {step: old for step, old in earlier.marks.items() if step <= first} | marks
        notes = [
            *earlier.notes,
            f"{label} went on at step {first} from {str(before)!r}, which is shown up to there.",
            *notes,
        ]
    return Run(label, folder, series, settings, marks, tuple(notes))


def _first_step(series: Mapping[str, Series]) -> int:
    """Steps made before the first one that anything was logged of: training itself may not have been yet."""
    return min(max(s - name.startswith("val/"), 0) for name, values in series.items() for s in values)


def find_tokens(folder: Path) -> Path | None:
    """The folder of what `TokenRecorder` recorded of a run; None where nothing is found.

    It lies in the run's folder, where `dirpath` says, or in that of the run which this one went on from: a resumed run
    records where the first one did.
    """
    settings = _settings(folder)
    named = settings.get(f"{RECORDER}.dirpath")
    for place in (folder, *([Path(named).expanduser()] if isinstance(named, str) else [])):
        if has_records(place):
            return find_records(place)
    before = _earlier_part(folder, settings)
    return None if before is None else find_tokens(before)


def read_metrics(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Every metric's value by step, and a note where a kill has cut the last row.

    Raises:
        ValueError: The file is no table of metrics.
    """
    text = _text(path)
    lines, notes = text.splitlines(keepends=True), []
    if len(lines) > 1 and not lines[-1].endswith("\n"):
        lines.pop()
        notes.append(f"The last row of {str(path)!r} is cut off, and left out.")
    try:
        names, *rows = [*csv.reader(lines)] or [[]]
    except csv.Error as error:
        raise ValueError(f"runs: {str(path)!r} is no table: {error}. Mend it, or take it away.") from error
    if "step" not in names or (not text.endswith("\n") and len(lines) < 2):
        raise ValueError(
            f"runs: {str(path)!r} is no table of metrics: expected a first line with names, 'step' among them."
            " Name another run, or take the file away."
        )
    series: dict[str, dict[int, float]] = {}
    trained: set[int] = set()
    for number, cells in enumerate(rows, start=2):
        if len(cells) != len(names):
            raise ValueError(
                f"runs: line {number} of {str(path)!r} has {len(cells)} cells, but the first line has {len(names)}"
                " names. Take the line away."
            )
        try:
            values = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell}
        except ValueError as error:
            raise ValueError(f"runs: line {number} of {str(path)!r}: {error}. Mend it or take it away.") from error
        _add_row(series, trained, values)
    if not series:
        raise ValueError(f"runs: {str(path)!r} holds no values yet. Wait for the first step, or name another run.")
    return {name: dict(sorted(values.items())) for name, values in series.items()}, notes


def _add_row(series: dict[str, dict[int, float]], trained: set[int], values: dict[str, float]) -> None:
    step = values.pop("step", math.nan)
    values.pop("epoch", None)
    if math.isnan(step):
        return
    is_training = any(name.startswith(("train/", "selection/")) for name in values)
    if is_training:
        trained.add(int(step))
    validated = [name for name in values if name.startswith("val/")]
    # whether training logged the step too says nothing: it logs every log_every_n_steps only
    is_repeated = any(0 in series.get(name, ()) for name in validated)
    is_after = bool(validated) and (step > 0 or 0 in trained or is_repeated)
    for name, value in values.items():
        series.setdefault(name, {})[int(step) + is_after] = value


def read_marks(path: Path) -> tuple[dict[int, Mapping[str, float]], list[str]]:
    """Mean mark of each held-out problem, by the step of the validation; nothing where none were kept."""
    if not path.is_file():
        return {}, []
    lines = _text(path).splitlines(keepends=True)
    notes = []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        notes.append(f"The last line of {str(path)!r} is cut off, and left out.")
    marks: dict[int, Mapping[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            marks[int(row["step"])] = {uid: sum(each) / len(each) for uid, each in row["marks"].items() if each}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"runs: line {number} of {str(path)!r} is no line of marks ({type(error).__name__}). Take it away."
            ) from error
    return marks, notes


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"runs: {str(path)!r} is no YAML: {reason}. Mend it or take it away.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"runs: {str(path)!r} holds no settings by name. Mend it or take it away.")
    return readable(settings)


def _earlier_part(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The run whose checkpoint this one went on from, where its folder is still there."""
    path = settings.get("ckpt_path")
    if not isinstance(path, str):
        return None
    before = Path(path).expanduser().resolve().parent.parent  # RUN/checkpoints/last.ckpt
    return before if (before / METRICS).is_file() and before != folder.resolve() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ValueError(f"runs: {str(path)!r} cannot be read: {reason}. Name another run, or mend it.") from error


def _by_number(folder: Path) -> list[tuple[int, str]]:
    """Folders in the order of the numbers in their names: version_10 after version_9."""
    return [(int("".join(filter(str.isdecimal, part)) or -1), part) for part in folder.parts]


def _labels(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: the parts of their paths that they do not share."""
    parts = [list(folder.resolve().parts) for folder in folders]
    if len(parts) == 1:
        return [str(folders[0])]
    while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[1:] for each in parts]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) for each in parts]
