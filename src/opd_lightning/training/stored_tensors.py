"""Tensors of a checkpoint or of a folder of safetensors, read one at a time, so that no model has to fit in memory.

Files are mapped into memory, and a mapped page counts as used memory until its file is closed. So every reading opens
the file anew, and what is used at once is one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opd_lightning.training.checkpoint_files import load_plain
from opd_lightning.training.checkpoints import open_checkpoint
from opd_lightning.training.sharded_checkpoints import is_sharded_checkpoint, read_tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensors:
    """The floating-point tensors in one place on the disk.

    Attributes:
        path: The checkpoint or the folder.
        shapes: Shape of every tensor, by its name.
        dtypes: Its dtype.
        files: The file of the folder that holds it; empty for a checkpoint.
        facts: What else a checkpoint says, or the metadata of the safetensors files.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    files: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor, copied to memory in its own dtype."""
        if is_sharded_checkpoint(self.path):
            return read_tensor(self.path, "state_dict", name)[rows].clone()
        if not self.files:
            return load_plain(self.path, self.path, mmap=True)["state_dict"][name][rows].clone()  # type: ignore[no-any-return]
        with _explained(self.files[name]), safe_open(self.files[name], "pt") as file:
            return file.get_slice(name)[rows].clone()  # type: ignore[no-any-return]


def tensors_of_checkpoint(path: Path) -> StoredTensors:
    """The weights of a checkpoint of any module; every checksum is compared first.

    Raises:
        ValueError: It is damaged, or no checkpoint of a LightningModule.
    """
    checkpoint = open_checkpoint(path)
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict):
        raise ValueError(f"run: {str(path)!r} holds no weights ('state_dict'). Take it out of the folder.")
    kept = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    return StoredTensors(
        path=path,
        shapes={name: tuple(weight.shape) for name, weight in kept.items()},
        dtypes={name: weight.dtype for name, weight in kept.items()},
        facts={name: checkpoint.get(name) for name in ("global_step", "opd_lightning")},
    )


def tensors_of_folder(folder: Path) -> StoredTensors:
    """The weights of every safetensors file of a folder (from their headers: no weight is read).

    Raises:
        ValueError: There is none, or one is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    files: dict[str, Path] = {}
    facts: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _explained(path), safe_open(path, "pt") as file:
            facts |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118  # it cannot be iterated over
                part = file.get_slice(name)
                if (dtype := DTYPES.get(part.get_dtype())) is not None:
                    shapes[name], dtypes[name], files[name] = tuple(part.get_shape()), dtype, path
    if not files:
        raise ValueError(f"expected *.safetensors in {str(folder)!r}; found none with weights.")
    return StoredTensors(folder, shapes, dtypes, files, facts)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"run: {str(path)!r} is damaged or cut short ({error}). Copy it again, or take it out of the run."
        ) from error
