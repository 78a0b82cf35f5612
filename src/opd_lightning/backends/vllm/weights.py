"""Weights on their way to a vLLM: by reference in this process, through a file to another one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def hand_over(
    llm: Any, weights: Iterator[tuple[str, Tensor]], weight_version: int, *, file_dtype: torch.dtype | None
) -> None:
    """Replace the weights of a vLLM that this process has started, and clear its prefix cache.

    Args:
        llm: A `vllm.LLM` whose weight-transfer engine is that of `worker`.
        weights: Names and tensors as a plain model folder has them.
        weight_version: Of the student.
        file_dtype: Pass them through a file in shared memory, in this dtype; None passes them by reference.
    """
    path = None if file_dtype is None else write_weights(weights, shared_memory_folder(), file_dtype)
    try:
        llm.start_weight_update()
        llm.update_weights({"update_info": {"weights": weights} if path is None else {"path": str(path)}})
        llm.finish_weight_update(str(weight_version))
    finally:
        if path is not None:
            path.unlink()
    if not llm.reset_prefix_cache():  # keys and values of the old weights would be reused without a word
        raise RuntimeError("vLLM could not clear its prefix cache after a weight sync: requests were still running.")
