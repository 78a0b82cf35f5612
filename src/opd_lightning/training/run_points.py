"""Find the points of a run on the disk, and the weights that it started from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from opd_lightning.sandbox import resolve
from opd_lightning.training.sharded_checkpoints import is_checkpoint
from opd_lightning.training.stored_tensors import tensors_of_checkpoint, tensors_of_folder
from opd_lightning.training.weight_updates import WeightPoint, WeightUpdates, scale_of_adapter

PointsFrom = Literal["any", "checkpoints", "exports", "records"]

DEEPEST = 5  # default_root_dir/mlruns/EXPERIMENT/RUN/updates/step=1
START_FOLDER = "start"  # beside records: the weights that they are measured from
_COPIES = ("last", "rescue", "hpc_ckpt")  # passed over where another file has the same step
_NUMBER_AT_THE_END = re.compile(r"(\d+)$")


def find_updates(
    run: str, start: str | None = None, pattern: str = "", points_from: PointsFrom = "any"
) -> WeightUpdates:
    """The updates of a run, from whatever of it was kept.

    Args:
        run: Folder of the run. Checkpoints (``*.ckpt``), exported folders and adapters (their names end in the step),
            and records of `UpdateRecorder` are looked for in it and in the folders below.
        start: The weights before the first step: a model folder, an adapter, a checkpoint, or a hub id that has been
            downloaded before. None takes a point at step 0, or what the checkpoints name, or the record's own.
        pattern: Searched in the names of the matrices wanted.
        points_from: Which of the three kinds; "any" takes the one with the most points.

    Raises:
        ValueError: There is nothing to compare, or it does not belong together.
    """
    root = Path(run).expanduser()
    if not root.is_dir():
        raise ValueError(f"run: there is no folder {run!r}. Expected the folder of a run, with its checkpoints in it.")
    finders: dict[str, Callable[[Path], list[Path]]] = {
        "checkpoints": _checkpoints,
        "exports": lambda folder: _numbered_folders(folder, has_config=True),
        "records": lambda folder: _numbered_folders(folder, has_config=False),
    }
    found = {kind: find(root) for kind, find in finders.items() if points_from in ("any", kind)}
    kind = max(found, key=lambda each: len(found[each]))
    if not found[kind]:
        looked_for = "checkpoints (*.ckpt), exported folders whose names end in the step, or records"
        raise ValueError(
            f"run: no {looked_for if points_from == 'any' else kind} in {run!r}. Name the folder of a run that kept"
            " some (ModelCheckpoint with save_top_k: -1, or the callback UpdateRecorder)."
        )
    point_of = _point_of_checkpoint if kind == "checkpoints" else _point_of_folder
    points = _one_per_step([point_of(path) for path in found[kind]], run)
    first = _point_at(start) if start is not None else _start_of(points)
    points = [point for point in points if point.step > 0]
    if len(points) < 2:
        raise ValueError(
            f"run: {run!r} has {len(points)} of {kind} after step 0; expected at least 2 to compare. Keep more"
            " (ModelCheckpoint with save_top_k: -1), or record with the callback UpdateRecorder."
        )
    return WeightUpdates(first, points, pattern)


def _checkpoints(root: Path) -> list[Path]:
    paths = (path for folder in _folders(root) for path in folder.glob("*.ckpt") if is_checkpoint(path))
    named: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda path: (path.name.startswith(_COPIES), str(path))):
        named.setdefault(path.resolve(), path)  # last.ckpt may be a link
    return list(named.values())


def _numbered_folders(root: Path, *, has_config: bool) -> list[Path]:
    return [
        folder
        for folder in _folders(root)
        if folder != root and _NUMBER_AT_THE_END.search(folder.name) and any(folder.glob("*.safetensors"))
        if has_config == any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    ]


def _folders(root: Path) -> Iterator[Path]:
    for depth in range(DEEPEST + 1):
        yield from sorted(path for path in (root.glob("*/" * depth) if depth else (root,)) if path.is_dir())


def _point_of_checkpoint(path: Path) -> WeightPoint:
    stored = tensors_of_checkpoint(path)
    step, ours = stored.facts["global_step"], stored.facts["opd_lightning"]
    if not isinstance(step, int):
        raise ValueError(f"run: {str(path)!r} does not say its step ('global_step'). Take it out of the folder.")
    point = WeightPoint(step, stored)
    if not point.factors:
        return point
    arguments: dict[str, Any] = ours["student"]["init_args"] if ours else {}
    if arguments.get("adapter_path"):
        return WeightPoint(step, stored, scale_of_adapter(Path(arguments["adapter_path"])))
    if not (lora := arguments.get("lora")):
        raise ValueError(
            f"run: {str(path)!r} holds LoRA factors and does not say their alpha. Export it with the adapter merged."
        )
    return WeightPoint(step, stored, float(lora["alpha"]) / int(lora["r"]))


def _point_of_folder(folder: Path) -> WeightPoint:
    number = _NUMBER_AT_THE_END.search(folder.name)
    step = int(number[1]) if number else 0
    stored = tensors_of_folder(folder)
    if (folder / "adapter_config.json").is_file():
        return WeightPoint(step, stored, scale_of_adapter(folder))
    is_model = (folder / "config.json").is_file()
    # records fold the scale into B
    return WeightPoint(step, stored, lora_scale=1.0, holds_updates=not is_model and folder.name != START_FOLDER)


def _one_per_step(points: Sequence[WeightPoint], run: str) -> list[WeightPoint]:
    """Sorted by step, without what `last.ckpt` and its kind repeat; refuses the points of more than one run."""
    kept: dict[int, WeightPoint] = {}
    for point in sorted(points, key=lambda each: (each.step, each.stored.path.name.startswith(_COPIES))):
        first = kept.setdefault(point.step, point)
        is_copy = point.stored.path.name.startswith(_COPIES)
        beginnings = [_beginning_of(each) for each in (next(iter(kept.values())), point)]
        if (point is not first and not is_copy) or beginnings[0] != beginnings[1]:
            other = first if point is not first else next(iter(kept.values()))
            raise ValueError(
                f"run: {run!r} holds more than one run: {str(other.stored.path)!r} and {str(point.stored.path)!r} do"
                " not belong together. Name the folder of one of them."
            )
    return list(kept.values())


def _beginning_of(point: WeightPoint) -> Any:
    """Student and seed, as far as a checkpoint says them; for records, the folder that holds them."""
    ours = point.stored.facts.get("opd_lightning")
    if point.holds_updates:
        return point.stored.path.parent
    if not isinstance(ours, dict):
        return None
    return ours["student"], ours.get("settings", {}).get("seed_everything (data.seed)")


def _start_of(points: Sequence[WeightPoint]) -> WeightPoint | None:
    """Where a run began, as far as it says so; None where updates stand for themselves."""
    point = points[0]
    if point.holds_updates:
        folder = point.stored.path.parent / START_FOLDER
        return _point_of_folder(folder) if folder.is_dir() else None
    if point.step == 0:
        return point
    ours = point.stored.facts.get("opd_lightning")
    arguments: dict[str, Any] = ours["student"]["init_args"] if isinstance(ours, dict) else {}
    if point.factors:
        adapter = arguments.get("adapter_path")
        return None if adapter is None else _point_at(adapter, "run: the adapter that the run began with")
    if (path := arguments.get("path")) is None:
        raise ValueError(
            f"start: {str(point.stored.path)!r} does not say which weights the run began with. Set --start to them: a"
            " model folder, a checkpoint, or a hub id."
        )
    return _point_at(path, "start: the weights that the run began with", arguments.get("revision"))


def _point_at(place: str, what: str = "start: the weights", revision: str | None = None) -> WeightPoint:
    """The weights at a path or in the cache of the hub.

    Raises:
        ValueError: They are not there.
    """
    path = Path(resolve(place)).expanduser()
    if path.is_file():
        return _point_of_checkpoint(path)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(place, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise ValueError(
                f"{what} are not at {place!r}, neither as a folder nor among the downloads of the hub. Set --start to"
                " where they are now."
            ) from error
    try:
        return _point_of_folder(path)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}".replace(": run:", ":")) from error
