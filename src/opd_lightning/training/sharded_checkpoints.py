"""Checkpoints that several processes write together, each its own shards: a folder of ordinary checkpoint files.

`whole.ckpt` is the checkpoint with every shard left out, `shards-0.ckpt`, `shards-1.ckpt`, ... hold these, one file for
each process. A tensor is cut along its first dimension, so the parts laid end to end are the tensor: any number of
processes, one included, can read it. torch's own format for this keeps its table of contents as a pickle, which runs
what it says, and looks at no checksum; these files are read like any other checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from opd_lightning.distributed import gather_objects, rank, world_size
from opd_lightning.training.checkpoint_files import find_damage, load_plain

WHOLE = "whole.ckpt"
_NUM_FILES = "num_shard_files"  # in whole.ckpt
_PLACE, _SHAPE = "shard_number", "shard_of_shape"  # what stands for a tensor there
_PART = ".part"

Read = Callable[[int, list[int]], Tensor | None]


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether it is such a folder."""
    return (path / WHOLE).is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether it is such a folder, or a file that is in none."""
    return is_sharded_checkpoint(path) or (path.is_file() and not is_sharded_checkpoint(path.parent))


def write_sharded(checkpoint: dict[str, Any], path: Path, write: Callable[[dict[str, Any], Path], None]) -> None:
    """Write a checkpoint that holds shards; all processes together, into a folder that all of them see.

    It is written beside its place and then renamed, so that it is there whole or not at all.

    Args:
        checkpoint: What this process has; all but the shards is taken from the first process.
        path: Where to.
        write: Writes one file.

    Raises:
        OSError: A process cannot write its part; all raise it.
    """
    part = path.with_name(path.name + _PART)
    shards: list[Tensor] = []
    rest = _without_shards(checkpoint, shards)
    _together(lambda: _make_anew(part) if rank() == 0 else None)

    def write_mine() -> None:
        write({"shards": shards}, _shard_file(part, rank()))
        if rank() == 0:
            write(rest | {_NUM_FILES: world_size()}, part / WHOLE)

    _together(write_mine)
    _together(lambda: _put_in_place(part, path) if rank() == 0 else None)


def read_whole(path: Path, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """Read such a checkpoint with whole tensors, on one process or on each; every file that is read is checked.

    Args:
        path: The folder.
        only: Leave shards out (None in their place) that are not under these keys; None reads all.

    Raises:
        ValueError: A file is absent or damaged.
    """
    content, parts = _open(path)

    def read(number: int, shape: list[int]) -> Tensor:
        return parts.rows(number, shape[0], 0, shape[0])

    return {
        key: _with_shards(value, read if only is None or key in only else lambda number, shape: None)
        for key, value in content.items()
    }


def read_tensor(path: Path, key: str, name: str) -> Tensor:
    """One whole tensor of those under a key.

    Raises:
        ValueError: A file is absent or damaged.
    """
    content, parts = _open(path)
    tensor: Tensor = _with_shards(content[key][name], lambda number, shape: parts.rows(number, shape[0], 0, shape[0]))
    return tensor


def read_sharded(path: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Read such a checkpoint on the processes of a mesh together, each its own shards, whoever wrote them.

    Raises:
        ValueError: A file is absent or damaged; all processes raise it.
    """

    def read(number: int, shape: list[int]) -> Tensor:
        start, stop = _share(shape[0], mesh)
        return _as_shard(parts.rows(number, shape[0], start, stop), torch.Size(shape), mesh)

    found: dict[str, Any] = {}
    reason: str | None = None
    try:
        content, parts = _open(path)
        found = _with_shards(content, read)
    except ValueError as error:
        reason = str(error)
    for told in gather_objects(reason):
        if told is not None:
            raise ValueError(told)
    return found


def distributed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, cut up as another one of its shape is; one that is already, or needs not be, is returned as it is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return _as_shard(tensor[slice(*_share(tensor.shape[0], like.device_mesh))], like.shape, like.device_mesh)


# ----------------------------------------------------------------------------------------------------------- internals


def _rows_of_each(num_rows: int, num_parts: int) -> int:
    """Rows of a shard, as FSDP2 cuts them; the last ones may have fewer, or none."""
    return max(1, -(-num_rows // num_parts))


def _share(num_rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First row of this process's shard, and the one after its last."""
    each = _rows_of_each(num_rows, mesh.size())
    return min(mesh.get_local_rank() * each, num_rows), min((mesh.get_local_rank() + 1) * each, num_rows)


def _as_shard(local: Tensor, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.to(device), mesh, (Shard(0),), run_check=False, shape=shape, stride=stride)


def _open(path: Path) -> tuple[dict[str, Any], _Parts]:
    content = _load(path / WHOLE)
    return content, _Parts(path, content.pop(_NUM_FILES))


def _load(file: Path) -> dict[str, Any]:
    damage = find_damage(file) if file.is_file() else "not there"
    if damage is not None:
        raise ValueError(
            f"ckpt_path: {file.name} in {str(file.parent)!r} is {damage}, and the checkpoint needs all its files. Copy"
            " the folder again, or use another checkpoint."
        )
    return load_plain(file, file, mmap=True)


class _Parts:
    """The shards in the files of a folder, by number."""

    def __init__(self, path: Path, num_files: int) -> None:
        self._path = path
        self._files: list[list[Tensor] | None] = [None] * num_files

    def rows(self, number: int, num_rows: int, start: int, stop: int) -> Tensor:
        """Rows of a tensor of `num_rows`, from the files that have them."""
        each = _rows_of_each(num_rows, len(self._files))
        if start >= stop:
            return self._open(0)[number][:0].clone()
        first, last = start // each, (stop - 1) // each
        together = torch.cat([self._open(file)[number] for file in range(first, last + 1)])
        return together[start - first * each : stop - first * each].clone()

    def _open(self, number: int) -> list[Tensor]:
        shards = self._files[number]
        if shards is None:
            shards = self._files[number] = _load(_shard_file(self._path, number))["shards"]
        return shards


def _without_shards(value: Any, shards: list[Tensor]) -> Any:
    """The value with numbers in the place of shards, which are appended to the list."""
    if isinstance(value, DTensor):
        (placement,) = value.placements
        if placement.is_replicate():
            return value.to_local().detach()
        assert placement.is_shard(0), "FSDP2 cuts along the first dimension"
        shards.append(value.to_local().detach())
        return {_PLACE: len(shards) - 1, _SHAPE: list(value.shape)}
    if isinstance(value, dict):
        return {key: _without_shards(item, shards) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_shards(item, shards) for item in value)
    return value


def _with_shards(value: Any, read: Read) -> Any:
    """The value with what `read` makes of number and shape in the place of each."""
    if isinstance(value, dict):
        if value.keys() == {_PLACE, _SHAPE}:
            return read(value[_PLACE], value[_SHAPE])
        return {key: _with_shards(item, read) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_shards(item, read) for item in value)
    return value


def _shard_file(path: Path, number: int) -> Path:
    return path / f"shards-{number}.ckpt"


def _together(act: Callable[[], None]) -> None:
    """Have every process do its part; when one fails all raise its error, and none waits for it."""
    reason: str | None = None
    try:
        act()
    except OSError as error:
        reason = str(error)
    for told in gather_objects(reason):
        if told is not None:
            raise OSError(told)


def _make_anew(part: Path) -> None:
    if part.is_dir():  # of a run that was killed
        shutil.rmtree(part)
    part.mkdir(parents=True)


def _put_in_place(part: Path, path: Path) -> None:
    old = path.with_name(f"{path.name}.old{_PART}")
    if old.is_dir():
        shutil.rmtree(old)
    if path.is_dir() and not path.is_symlink():
        path.rename(old)  # a folder cannot take the place of one that is not empty
    elif path.is_symlink() or path.exists():
        path.unlink()
    part.rename(path)
    if old.is_dir():
        shutil.rmtree(old)
