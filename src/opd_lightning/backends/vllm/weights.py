"""What vLLM gets of the live student: a model folder without weights, and the weights under a folder's names.

vLLM keeps its own copy of the student. Rows of embedding and head beyond the tokenizer's vocabulary are cut off, so
that no padding id can ever be sampled and no probability is lost to one.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_lightning.interfaces import Student

_SHARED_MEMORY = Path("/dev/shm")


def shared_memory_folder() -> Path:
    """Where files are memory: `/dev/shm`, or the folder for temporary files where there is none."""
    return (
        _SHARED_MEMORY
        if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
        else Path(tempfile.gettempdir())
    )


def write_blank_model(model: nn.Module, vocab_size: int, folder: Path) -> None:
    """Write the configuration of a loaded student: enough for vLLM to build the model and wait for its weights.

    Args:
        model: A transformers model, wrapped by peft or not.
        vocab_size: Rows of embedding and head to keep.
        folder: Where to; must exist.
    """
    bare = _bare_model(model)
    config = copy.deepcopy(bare.config)
    config.get_text_config(decoder=True).vocab_size = vocab_size
    if any(hasattr(part, "base_layer") for part in _vocabulary_layers(bare).values()):
        config.tie_word_embeddings = False  # an adapter on one of the two has parted them
    config.architectures = [type(bare).__name__]
    config.save_pretrained(str(folder))


def folder_weights(student: Student, model: nn.Module, vocab_size: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as a folder of the plain model has them: adapters merged, tied tensors once, shards gathered.

    Args:
        student: Knows how to take its adapter in.
        model: The live model; nothing in it changes.
        vocab_size: Cut embedding and head to so many rows; None leaves them as they are.
    """
    vocabulary_layers = set(_vocabulary_layers(_bare_model(model)))
    taken: list[Tensor] = []
    for name, tensor in student.named_weights(model):
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if name.rpartition(".")[0] in vocabulary_layers:
            if any(whole.data_ptr() == other.data_ptr() for other in taken):
                continue
            taken.append(whole)
            whole = whole[:vocab_size]
        yield name, whole


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


def _bare_model(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def _vocabulary_layers(bare: Any) -> dict[str, nn.Module]:
    """Embedding and head by name."""
    layers = (bare.get_input_embeddings(), bare.get_output_embeddings())
    return {name: part for name, part in bare.named_modules() if part in layers}
