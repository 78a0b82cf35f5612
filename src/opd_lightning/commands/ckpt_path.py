"""Which file `--ckpt_path last`, `best` and `hpc` mean.

Every run has a folder of its own, so Lightning, which looks into the new run's folder only, finds nothing there and
starts from the beginning. Here they mean the run before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_lightning.commands.trainer_settings import arguments_of
from opd_lightning.training.checkpoints import read_checkpoint
from opd_lightning.training.sharded_checkpoints import is_checkpoint

WORDS = ("last", "best", "hpc", "registry")
DEEPEST = 4  # default_root_dir/mlruns/EXPERIMENT/RUN/checkpoints


def find_checkpoint(wanted: str, trainer: Any, *, to_train: bool) -> Path:
    """The file that a word stands for.

    ``last`` is the checkpoint written last (by its time of modification, so that a run which was started anew counts
    although it has done fewer steps) under `default_root_dir`, in a `dirpath` of a ModelCheckpoint or in the
    `save_dir` of a logger: regular ones, `rescue.ckpt`, and those of a preempted cluster job. ``best`` is what the
    ModelCheckpoint of that same run found best by the metric it watches. ``hpc`` is the last of a preempted job.

    Args:
        wanted: One of `WORDS`.
        trainer: The settings of the trainer, as parsed.
        to_train: Training goes on from it, which weights alone cannot give: files without the rest are passed over.

    Raises:
        ValueError: There is no such file.
    """
    if wanted == "registry":
        raise ValueError("ckpt_path: a model registry is not supported. Download the checkpoint and name the file.")
    folders = _folders(trainer)
    pattern = "hpc_ckpt_*.ckpt" if wanted == "hpc" else "*.ckpt"
    newest_first = sorted(_checkpoints(folders, pattern), key=_age)
    for path in newest_first:
        if wanted == "best":
            if best := _best_of_run(path):
                return best
        elif not to_train or "optimizer_states" in read_checkpoint(path, needs_weights=False):
            return path
    where = ", ".join(str(folder) for folder in folders)
    if newest_first:
        raise ValueError(
            f"ckpt_path: {wanted}, but the {len(newest_first)} checkpoints under {where} hold weights only, which"
            " cannot be resumed. Start a new run from their weights (opd-lightning export, then student.path)."
        )
    raise ValueError(
        f"ckpt_path: {wanted}, but there is no checkpoint under {where} (trainer.default_root_dir). Name the file, set"
        " the folder of the earlier run, or leave --ckpt_path out to begin anew."
    )


def check_checkpoint(path: str, *, to_train: bool) -> None:
    """Refuse a named file that is absent, damaged or something else, or holds too little to train on.

    Raises:
        ValueError: It is.
    """
    if "optimizer_states" not in read_checkpoint(path, needs_weights=False) and to_train:
        raise ValueError(
            f"ckpt_path: {path!r} holds weights only (save_weights_only), which `fit` cannot resume. Start a new run"
            " from them (opd-lightning export, then student.path)."
        )


def _best_of_run(path: Path) -> Path | None:
    """What the run behind this checkpoint found best; None for a file with weights only, which does not say."""
    callbacks = read_checkpoint(path, needs_weights=False).get("callbacks")
    if callbacks is None:
        return None
    states = [state for name, state in callbacks.items() if name.startswith("ModelCheckpoint")]
    watching = [state for state in states if state.get("monitor") and state.get("best_model_path")]
    if len(watching) != 1:
        metrics = ", ".join(state["monitor"] for state in watching) or "none"
        raise ValueError(
            f"ckpt_path: best, but the run behind {str(path)!r} kept its best checkpoint by {metrics}; expected one"
            " ModelCheckpoint with a `monitor`. Use last, or name the file."
        )
    named = Path(watching[0]["best_model_path"])
    for best in (named, path.parent / named.name):  # the folder may have moved since
        if is_checkpoint(best):
            return best
    raise ValueError(f"ckpt_path: best was {str(named)!r} by {watching[0]['monitor']}, but it is gone. Use last.")


def _folders(trainer: Any) -> list[Path]:
    """Where checkpoints may lie, without repetition."""
    folders = [trainer.get("default_root_dir") or "."]
    folders += [arguments.get("dirpath") for arguments in arguments_of(trainer.get("callbacks"))]
    folders += [arguments.get("save_dir") for arguments in arguments_of(trainer.get("logger"))]
    return list(dict.fromkeys(Path(folder) for folder in folders if folder))


def _checkpoints(folders: list[Path], pattern: str) -> Iterator[Path]:
    for folder in folders:
        for depth in range(DEEPEST + 1):
            for path in folder.glob("*/" * depth + pattern):
                if is_checkpoint(path):
                    yield path


def _age(path: Path) -> tuple[int, bool, str]:
    """Sorts the newest first; of two names for one file, `last.ckpt`."""
    return -path.stat().st_mtime_ns, path.name != "last.ckpt", str(path)
