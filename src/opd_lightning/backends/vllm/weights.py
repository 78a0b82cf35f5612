"""Files of weights on their way to a vLLM of another process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_SHARED_MEMORY = Path("/dev/shm")


def shared_memory_folder() -> Path:
    """Where files are memory: `/dev/shm`, or the folder for temporary files where there is none."""
    return (
        _SHARED_MEMORY
        if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
        else Path(tempfile.gettempdir())
    )


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a safetensors file and return its path; the caller removes it.

    Args:
        weights: Names and tensors, on any device.
        folder: Where to; a folder in shared memory makes it a copy and no disk access.
        dtype: Cast floating-point tensors to it; None keeps theirs.
    """
    tensors = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous() for name, tensor in weights
    }
    handle, path = tempfile.mkstemp(prefix="opd_lightning_weights_", suffix=".safetensors", dir=folder)
    os.close(handle)
    save_file(tensors, path)
    return Path(path)
