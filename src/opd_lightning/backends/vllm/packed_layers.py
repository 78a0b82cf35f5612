"""Live weights straight into the layers of a vLLM on a CPU, past its reload: where layers keep them as they are given.

There a linear layer packs its weight for oneDNN and lets go of it. vLLM's layer-wise reload makes the layer anew for
each update, copies the weights into it, and packs that. Here a weight is packed from where it lies; only those that a
layer fuses (query, key and value; gate and up) are laid together first. Which weights make which layer is guessed from
their names and then seen: the first update goes through the reload, and what it packed must be what this would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Target:
    """A tensor of vLLM's model, and the weights of which it consists, along the first dimension."""

    layer: Any
    name: str
    parts: tuple[str, ...]
    is_packed: bool

    def put(self, parts: list[Tensor]) -> None:
        """Take over new weights."""
        if not self.is_packed:
            own, start = getattr(self.layer, self.name).data, 0
            for part in parts:
                own[start : start + len(part)].copy_(part)
                start += len(part)
            return
        empty = self.layer.weight
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        self.layer.weight = nn.Parameter(weight.to(empty.dtype), requires_grad=False)
        self.layer.quant_method.process_weights_after_loading(self.layer)
        self.layer.weight = empty


class PackedLayers:
    """Where each weight goes.

    Args:
        targets: All tensors of the model that have weights.
    """

    def __init__(self, targets: list[_Target]) -> None:
        self._target_of = {part: target for target in targets for part in target.parts}

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over new weights; of each layer as soon as all of its own are there."""
        waiting: dict[str, Tensor] = {}
        for name, tensor in weights:
            waiting[name] = tensor
            target = self._target_of[name]
            if all(part in waiting for part in target.parts):
                target.put([waiting.pop(part) for part in target.parts])
        assert not waiting, "a part of a layer did not come"


class Observer:
    """Watches a reload, to find out whether `PackedLayers` would have done the same.

    Args:
        model: vLLM's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: dict[str, Tensor] = {}
        self._packed: dict[nn.Module, Tensor] = {}
        found: list[Any] = [getattr(layer, "quant_method", None) for layer in model.modules()]
        self._methods = {id(each): each for each in found if hasattr(each, "process_weights_after_loading")}
        for method in self._methods.values():
            method.process_weights_after_loading = self._watched(method.process_weights_after_loading)

    def _watched(self, process: Any) -> Any:
        def note(layer: nn.Module) -> None:
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor):
                self._packed[layer] = weight.data
            process(layer)

        return note

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, noted as they go by."""
        for name, tensor in weights:
            self._given[name] = tensor
            yield name, tensor

    def close(self) -> None:
        """Watch no longer."""
        for method in self._methods.values():
            del method.process_weights_after_loading

    @torch.no_grad()
    def conclude(self) -> PackedLayers | None:
        """Where each weight goes; None where that is not so simple."""
        fused = getattr(self._model, "packed_modules_mapping", {})
        targets: list[_Target] = []
        seen: set[int] = set()  # a head that is tied has the embedding's
        for path, layer in self._model.named_modules():
            stem, _, last = path.rpartition(".")
            pieces = [f"{stem}.{piece}".lstrip(".") for piece in fused.get(last, [last])]
            for name, own in layer.named_parameters(recurse=False):
                if id(own) in seen:
                    continue
                seen.add(id(own))
                is_packed = name == "weight" and own.numel() == 0 and layer in self._packed
                truth = self._packed[layer] if is_packed else own.data
                parts = tuple(f"{piece}.{name}" for piece in pieces)
                if not self._is_made_of(truth, parts, may_be_longer=not is_packed):
                    return None
                targets.append(_Target(layer, name, parts, is_packed))
        used = [part for target in targets for part in target.parts]
        return PackedLayers(targets) if sorted(used) == sorted(self._given) else None

    def _is_made_of(self, truth: Tensor, parts: tuple[str, ...], *, may_be_longer: bool) -> bool:
        if any(part not in self._given for part in parts):
            return False
        together = torch.cat([self._given[part] for part in parts]).to(truth.dtype)
        return torch.equal(truth[: len(together)] if may_be_longer else truth, together)
