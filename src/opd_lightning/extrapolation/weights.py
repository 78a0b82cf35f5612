"""Named weights, the older point they are measured from, and movement along the line through both."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from opd_lightning.distributed import gather_objects, rank, world_size
from opd_lightning.extrapolation.low_rank import extrapolate_product, find_pairs
from opd_lightning.extrapolation.shards import any_sharded, export_shard, local_shard, shard_of, sum_over_shards, whole

LoraStep = Literal["factors", "product"]
ParameterFilter = str | Callable[[str], bool] | None

# Measured (benchmarks/lora_step.py): the exact step of the product trains a little worse, and it changes coordinates.
DEFAULT_LORA_STEP: LoraStep = "factors"

_CHUNK = 2**22  # entries per temporary when Delta is measured
_NUM_SAMPLED = 2**20  # entries of Delta remembered for the cosine with the next one


def check_device(anchor_device: torch.device | str | None) -> None:
    """Refuse a place for the older point that this machine does not have.

    Raises:
        ValueError: It is no device, or not here.
    """
    accelerator = torch.accelerator.current_accelerator()
    num_devices = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    try:
        device = torch.device("cpu" if anchor_device is None else anchor_device)
    except RuntimeError:
        device = None  # not even a name of one
    if device is None or (device.index or 0) >= num_devices.get(device.type, 0):
        here = ", ".join(repr(kind if n == 1 else f"{kind}:0..{n - 1}") for kind, n in num_devices.items() if n)
        raise ValueError(
            f"anchor_device: expected null (beside the weights) or a device of this machine ({here}), got"
            f" {str(anchor_device)!r}."
        )


def select_parameters(parameters: Iterable[tuple[str, Tensor]], choose: ParameterFilter) -> dict[str, Tensor]:
    """The trainable weights whose names are chosen, in order, tied weights once.

    Args:
        parameters: Names and weights, as `Module.named_parameters()` gives them.
        choose: A regular expression searched in each name, a predicate on names, or None for all.

    Raises:
        ValueError: The expression is malformed, two weights have one name, or no weight is left.
    """
    trainable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in parameters:
        if weight.requires_grad and id(weight) not in seen:
            if name in trainable:
                raise ValueError(
                    f"parameters: two trainable weights are named {name!r}. Give each a name of its own: pass the"
                    " optimiser parameters instead of named_parameters(), or set EffOPDOptimizer.module."
                )
            seen.add(id(weight))
            trainable[name] = weight
    if not trainable:
        raise ValueError("parameters: there is no trainable weight to move (requires_grad is off everywhere).")
    if choose is None:
        return trainable
    if isinstance(choose, str):
        try:
            pattern = re.compile(choose)
        except re.error as error:
            raise ValueError(f"parameters: {choose!r} is not a regular expression: {error}.") from error
        chosen = {name: weight for name, weight in trainable.items() if pattern.search(name)}
    else:
        chosen = {name: weight for name, weight in trainable.items() if choose(name)}
    if not chosen:
        shown = ", ".join(list(trainable)[:40]) + (", ..." if len(trainable) > 40 else "")
        raise ValueError(
            f"parameters: {choose!r} matches none of the {len(trainable)} trainable weights. Their names are: {shown}."
        )
    return chosen


class AnchoredWeights:
    """Weights W, an anchor W_0, and the ray `W + factor (W - W_0)` (arXiv 2605.11739, section 4.1).

    At rest one copy of the weights is kept (the anchor), during a search two (the anchor and the point searched from).
    Only the shards that this process holds are touched. Each candidate is computed from both points by one fused
    kernel per weight that reads two numbers and writes one, in at least float32 whatever the weights' dtype; going
    back copies the saved values, so it is exact.

    Args:
        parameters: The weights to move; they are edited in place.
        anchor_device: Where the copies live; None puts each beside its weight. On the CPU they are pinned when CUDA
            is there, and one weight at a time is staged on its device.
        lora: "factors" moves A and B of a LoRA pair one by one, "product" moves them so that B A takes the exact step.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        anchor_device: torch.device | str | None = None,
        lora: LoraStep = DEFAULT_LORA_STEP,
    ) -> None:
        self.parameters = dict(parameters)
        self._device = None if anchor_device is None else torch.device(anchor_device)
        self._anchors = {name: self._copy(weight) for name, weight in self._local_weights()}
        self._saved: dict[str, Tensor] = {}
        self._last_direction: dict[str, Tensor] = {}
        self._pairs = dict(find_pairs(self.parameters)) if lora == "product" else {}
        self._single = set(self.parameters) - set(self._pairs) - set(self._pairs.values())
        num_entries = sum(weight.numel() for weight in self.parameters.values())
        self._stride = max(1, math.ceil(num_entries / _NUM_SAMPLED))

    def _local_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.parameters.items():
            yield name, local_shard(weight)

    def _copy(self, weight: Tensor) -> Tensor:
        device = self._device or weight.device
        pinned = device.type == "cpu" and weight.device.type == "cuda"
        return torch.empty_like(weight, device=device, pin_memory=pinned).copy_(weight)

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Norm of Delta = W - W_0, and its cosine with the Delta of the previous call.

        The cosine is taken over at most about 2**20 evenly spread entries (so over all of them in a small model),
        because keeping all of the previous Delta would cost another copy of the weights. It is NaN when there is no
        previous Delta. A Delta of zero is not remembered.
        """
        sums: list[tuple[Tensor, list[float]]] = []
        direction: dict[str, Tensor] = {}
        for name, weight in self._local_weights():
            anchor = self._anchors[name]
            sample = direction[name] = self._sample(weight) - self._sample(anchor).to(weight.device)
            last = self._last_direction[name].to(sample) if name in self._last_direction else torch.zeros_like(sample)
            products = [float((x * y).sum()) for x, y in ((sample, last), (sample, sample), (last, last))]
            sums.append((self.parameters[name], [_squared_distance(weight, anchor), *products]))
        squared_norm, dot, squared_new, squared_old = sum_over_shards(sums)
        if squared_norm > 0:
            self._last_direction = direction
        scale = math.sqrt(squared_new * squared_old)
        return math.sqrt(squared_norm), dot / scale if scale > 0 else math.nan

    def _sample(self, tensor: Tensor) -> Tensor:
        stride = self._stride
        row = tensor.shape[-1] if tensor.ndim > 0 else 1
        while row > 0 and math.gcd(stride, row) > 1:  # a shard may be empty
            stride += 1  # else the sample would hit the same few columns in every row
        return tensor.reshape(-1)[::stride].to(torch.promote_types(tensor.dtype, torch.float32))

    @torch.no_grad()
    def begin(self) -> None:
        """Save the current weights as the point W that `move_to` starts from."""
        assert not self._saved, "a search is under way"
        self._saved = {name: self._copy(weight) for name, weight in self._local_weights()}

    @torch.no_grad()
    def move_to(self, factor: float) -> None:
        """Write `W + factor (W - W_0)` into the weights; 0 copies W back bit for bit."""
        for name, weight in self._local_weights():
            if factor == 0:
                weight.copy_(self._saved[name], non_blocking=True)
            elif name in self._single:
                _extrapolate(self._anchors[name], self._saved[name], factor, out=weight)
        if factor != 0:
            for pair in self._pairs.items():
                self._move_pair(pair, factor)
        torch.clear_autocast_cache()  # else an enclosing autocast block goes on with casts of the weights before

    def _move_pair(self, names: tuple[str, str], factor: float) -> None:
        weights = [self.parameters[name] for name in names]
        a, b, a_0, b_0 = (
            whole(copies[name].to(local_shard(weight).device), weight)
            for copies in (self._saved, self._anchors)
            for name, weight in zip(names, weights, strict=True)
        )
        moved = extrapolate_product(a, b, a_0, b_0, factor)
        for weight, full in zip(weights, moved, strict=True):
            local_shard(weight).copy_(shard_of(full, weight))

    @torch.no_grad()
    def end(self, *, moved: bool) -> None:
        """Make the current weights the new anchor; `moved` says whether they differ from W."""
        if moved:
            for name, weight in self._local_weights():
                self._anchors[name].copy_(weight)
        else:
            self._anchors = self._saved
        self._saved = {}

    def abort(self) -> None:
        """Put W back and keep the old anchor."""
        self.move_to(0.0)
        self._saved = {}

    def state_dict(self, *, gathered: bool) -> dict[str, Any]:
        """Anchor and last direction.

        Args:
            gathered: Sharded anchors become full tensors on the CPU of the first process, one weight at a time (a
                collective call; other processes get none). Otherwise they stay shards (DTensor) on every process.
        """
        anchors = {
            name: export_shard(self._anchors[name], weight, gathered=gathered)
            for name, weight in self.parameters.items()
        }
        directions = [self._last_direction]
        if gathered and any_sharded(self.parameters.values()):
            directions = gather_objects(self._last_direction)
        return {
            "anchor": {name: anchor for name, anchor in anchors.items() if anchor is not None},
            "directions": directions,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Restore `state_dict`, also on another number of processes (then the first cosine is NaN).

        Args:
            state: What `state_dict` returned.
            strict: Insist on an anchor for every weight; otherwise the anchor of new weights is where they are now.

        Raises:
            ValueError: The anchors belong to other weights.
        """
        anchors: Mapping[str, Tensor] = state["anchor"]
        shapes = {name: tuple(weight.shape) for name, weight in self.parameters.items()}
        saved_shapes = {name: tuple(anchor.shape) for name, anchor in anchors.items()}
        wrong = [name for name, shape in saved_shapes.items() if shapes.get(name) != shape]
        missing = [name for name in shapes if name not in anchors] if strict else []
        if wrong or missing:
            raise ValueError(
                "parameters: the saved EffOPD state belongs to other weights than those chosen now. Without a partner "
                f"of the same shape: saved {wrong[:10]}, current {missing[:10]}. Choose the same weights as in the run "
                "that saved it, or resume without EffOPD's state."
            )
        for name, anchor in anchors.items():
            self._anchors[name].copy_(shard_of(anchor, self.parameters[name]))
        directions: list[dict[str, Tensor]] = state["directions"]
        own = directions[rank() if len(directions) == world_size() else 0]
        fits = all(
            name in own and own[name].shape == self._sample(weight).shape for name, weight in self._local_weights()
        )
        self._last_direction = {name: sample.clone() for name, sample in own.items()} if fits else {}


def _extrapolate(anchor: Tensor, saved: Tensor, factor: float, out: Tensor) -> None:
    # lerp(anchor, saved, 1 + factor) = saved + factor (saved - anchor), float32 inside for 16-bit weights. One kernel
    # per weight is the memory floor; a foreach version needs a copy first and was slower by a third.
    if saved.device == out.device:
        torch.lerp(anchor, saved, 1 + factor, out=out)
    else:
        out.copy_(saved, non_blocking=True)
        torch.lerp(anchor.to(out.device, non_blocking=True), out, 1 + factor, out=out)


def _squared_distance(weight: Tensor, anchor: Tensor) -> float:
    total = 0.0
    for x, y in zip(torch.split(weight.reshape(-1), _CHUNK), torch.split(anchor.reshape(-1), _CHUNK), strict=True):
        precision = torch.promote_types(x.dtype, torch.float32)
        total += float(torch.linalg.vector_norm(x.to(precision) - y.to(x.device, precision))) ** 2
    return total
