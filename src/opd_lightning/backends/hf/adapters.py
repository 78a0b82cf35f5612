"""LoRA through peft: wrap a model, see it without its adapter, and read its weights with the adapter merged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from opd_lightning.backends.hf.anatomy import causal_lm
from opd_lightning.distributed import gathered, is_shard


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation of a frozen model (arXiv 2106.09685).

    Args:
        r: Rank of the update.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout before the adapter, in training only. Above 0 the trained policy is no longer quite the one
            that generated. What is dropped is a function of seed, step, rollout and position, whatever the number of
            processes, except in experts that see some of the tokens only: there it also depends on what else the
            process trains. An adapter on the head has none: the head is used as one weight.
        target_modules: Names of the linear layers to adapt, or "all-linear" for all but the head.

    Raises:
        ValueError: A value is outside its range.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"student.lora.r: expected an integer of at least 1, got {self.r}.")
        if not self.alpha > 0:
            raise ValueError(f"student.lora.alpha: expected a positive number, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"student.lora.dropout: expected a number in [0, 1), got {self.dropout}.")


def add_lora(model: Any, settings: LoraSettings) -> PeftModel:
    """Freeze the model and put a fresh adapter on it, which changes nothing until it is trained.

    Raises:
        ValueError: A target module does not exist.
    """
    warn_of_dropout("student.lora.dropout", settings.dropout)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        )
        raise ValueError(
            f"student.lora.target_modules: {settings.target_modules!r} does not fit this model; its linear layers are"
            f" {', '.join(linear)}."
        ) from error


def load_adapter(model: Any, path: str) -> PeftModel:
    """Put a saved LoRA adapter on the model and go on training it.

    Raises:
        ValueError: The folder is no adapter for this model, or trains more than low-rank updates.
    """
    try:
        wrapped = PeftModel.from_pretrained(model, path, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"student.adapter_path: cannot load a LoRA adapter from {path!r}: {reason}") from error
    if wrapped.active_peft_config.modules_to_save:
        raise ValueError(
            f"student.adapter_path: {path!r} also replaces whole modules"
            f" ({', '.join(wrapped.active_peft_config.modules_to_save)}), which is not supported. Merge it into its"
            " base model first."
        )
    warn_of_dropout(f"{path}/adapter_config.json: lora_dropout", wrapped.active_peft_config.lora_dropout)
    return wrapped


def warn_of_dropout(setting: str, probability: float) -> None:
    """Say what dropout of an adapter costs, where there is any."""
    if probability > 0:
        warnings.warn(
            f"{setting}={probability}: in training the policy is no longer quite the one that generated, so losses do"
            " not vanish where student and teacher agree, and rollout_mismatch shows it. 0 switches it off.",
            stacklevel=3,
        )


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Run the base model; afterwards the adapter is on and trains again."""
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as a folder of the plain model holds them, adapters merged layer by layer, out of place.

    Merging in place and taking it back would shift the frozen weights by a rounding each time.
    """
    lm = causal_lm(model)
    adapted = {name: part for name, part in lm.named_modules() if isinstance(part, BaseTunerLayer)}
    merged: set[str] = set()
    for name, tensor in lm.state_dict().items():
        # stacked experts have one adapter inside the other: the outermost has the module's own name
        owner = min((prefix for prefix in _prefixes(name) if prefix in adapted), key=len, default=None)
        if owner is None:
            yield name, tensor
        elif owner not in merged:
            merged.add(owner)
            for suffix, merged_tensor in _merge(adapted[owner]).state_dict().items():
                yield f"{owner}.{suffix}", merged_tensor


def _merge(layer: Any) -> nn.Module:
    """The adapted layer with all its adapters merged, as a copy."""
    layer = copy.deepcopy(layer)
    for part in layer.modules():
        for name, weight in part.named_parameters(recurse=False):
            if is_shard(weight):  # a shard of a product is no product of shards
                setattr(part, name, nn.Parameter(gathered(weight.detach()), requires_grad=False))
    while isinstance(layer, BaseTunerLayer):
        layer.merge()
        layer = layer.base_layer
    return layer  # type: ignore[no-any-return]


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
