"""Write a model folder, whole, as a bare adapter, or without weights, and read weights as a plain folder holds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from opd_lightning.backends.hf.adapters import named_weights
from opd_lightning.backends.hf.anatomy import causal_lm
from opd_lightning.backends.hf.loading import DTYPES
from opd_lightning.backends.hf.sharding import plain_class
from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.distributed import gathered, local_part


def save_model(
    model: nn.Module, tokenizer: HFTokenizer, folder: Path, *, merge_adapter: bool, dtype: str | None
) -> None:
    """Write a folder that `from_pretrained` loads: safetensors, configuration, generation config, tokenizer.

    Args:
        model: A causal language model, wrapped by peft or not; nothing in it changes.
        tokenizer: Written beside it; its stop ids end generations.
        folder: Where to; made if it does not exist.
        merge_adapter: Write the whole model with the adapter merged in; otherwise only the adapter, which names its
            base model. Without an adapter it makes no difference.
        dtype: Dtype of the written weights; None keeps theirs.

    Raises:
        ValueError: A dtype for a bare adapter, or an unknown one.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel) and not merge_adapter:
        if dtype is not None:
            raise ValueError(f"dtype: a bare adapter keeps its own; merge it to write {dtype}.")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        _save_whole_model(model, tokenizer, folder, dtype)
    tokenizer.save(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors writes for the owner alone; a server may be another user
        weights.chmod((folder / "tokenizer_config.json").stat().st_mode)


def save_configuration(model: nn.Module, folder: Path, num_rows: int) -> None:
    """Write the configuration alone, with so many rows in embedding and head."""
    config = _own_config(model)
    config.get_text_config(decoder=True).vocab_size = num_rows
    config.architectures = [plain_class(causal_lm(model)).__name__]
    config.save_pretrained(str(folder))


def plain_weights(model: nn.Module, num_rows: int | None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as a plain model folder has them: adapters merged, tied tensors once, shards gathered."""
    vocabulary_layers = set(_vocabulary_layers(causal_lm(model)))
    taken: list[Tensor] = []
    for name, tensor in named_weights(model):
        whole = gathered(tensor).detach()
        if name.rpartition(".")[0] in vocabulary_layers:
            mine = local_part(tensor)
            if any(mine.data_ptr() == other.data_ptr() for other in taken):
                continue
            taken.append(mine)
            whole = whole[:num_rows]
        yield name, whole


def _save_whole_model(model: nn.Module, tokenizer: HFTokenizer, folder: Path, dtype: str | None) -> None:
    lm = causal_lm(model)
    weights = {
        name: gathered(tensor).to(
            "cpu", DTYPES[dtype] if dtype is not None and tensor.is_floating_point() else tensor.dtype
        )
        for name, tensor in named_weights(model)
    }
    with torch.device("meta"):
        blank = plain_class(lm)(_own_config(model))
    blank.load_state_dict(weights, assign=True)
    blank.tie_weights()
    blank.generation_config = copy.deepcopy(lm.generation_config)
    blank.generation_config.eos_token_id = list(tokenizer.stop_ids) or None  # what closed a response in training
    blank.generation_config.pad_token_id = tokenizer.pad_id
    blank.save_pretrained(str(folder))


def _own_config(model: nn.Module) -> Any:
    lm = causal_lm(model)
    config = copy.deepcopy(lm.config)
    if any(hasattr(part, "base_layer") for part in _vocabulary_layers(lm).values()):
        config.tie_word_embeddings = False  # an adapter on one of the two has parted them
    return config


def _vocabulary_layers(lm: Any) -> dict[str, nn.Module]:
    """Embedding and head by name."""
    layers = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return {name: part for name, part in lm.named_modules() if part in layers}
