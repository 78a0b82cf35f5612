"""How far each weight matrix of a run has moved from its start: the update at every point that was kept.

A point is a checkpoint, an exported folder, or a record of `UpdateRecorder`. Names are those of the plain model,
whatever the point is; under LoRA the update is that of the merged matrix, taken from the factors without rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning.training.stored_tensors import StoredTensors

_WRAPPERS = re.compile(r"^(?:student\.|base_model\.model\.|_orig_mod\.)+")
_FACTOR = re.compile(r"\.lora_([AB])(?:\.\w+)?(?:\.weight)?$")
_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")
_KINDS = (
    ("embedding", re.compile(r"embed|lm_head|\.wte\b|\.wpe\b")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|experts")),
)
ALL = slice(None)


def kind_of(name: str) -> str:
    """What a matrix belongs to, by its name: "attention", "mlp", "embedding" (the head too), or "other"."""
    return next((kind for kind, pattern in _KINDS if pattern.search(f".{name}")), "other")


def layer_of(name: str) -> int | None:
    """Number of the layer that a weight belongs to."""
    found = _LAYER.search(f".{name}")
    return None if found is None else int(found[1])


def plain_name(name: str) -> str:
    """The name of a weight in the plain model: without the module around it, and without what peft adds."""
    return _WRAPPERS.sub("", name).replace(".base_layer.", ".")


@dataclass(frozen=True)
class WeightPoint:
    """The weights at one step, or their updates.

    Args:
        step: Optimiser steps done.
        stored: Where they are.
        lora_scale: What the product of LoRA factors is multiplied with (alpha / r).
        holds_updates: Plain matrices in it are changes already, not weights.
    """

    step: int
    stored: StoredTensors
    lora_scale: float | None = None
    holds_updates: bool = False

    @cached_property
    def factors(self) -> dict[str, dict[str, str]]:
        """Stored names of the LoRA factors A [r, in] and B [out, r], by the plain name of their matrix.

        Raises:
            ValueError: There is a part of an adapter that is no such factor.
        """
        found: dict[str, dict[str, str]] = {}
        for name in self.stored.shapes:
            if match := _FACTOR.search(name):
                found.setdefault(f"{plain_name(name[: match.start()])}.weight", {})[match[1]] = name
            elif "lora_" in name:
                raise ValueError(
                    f"run: {name} is a part of an adapter (on an embedding, or more than plain LoRA) that is not merged"
                    " here. Export the checkpoints with the adapter merged (opd-lightning export), and analyse those."
                )
        return {name: pair for name, pair in found.items() if len(pair) == 2}

    @cached_property
    def plain(self) -> dict[str, str]:
        """Stored names of all other weights, by their plain names."""
        return {plain_name(name): name for name in self.stored.shapes if "lora_" not in name}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights, by plain name: of the merged matrices under LoRA, and of no frozen ones."""
        shapes = self.stored.shapes
        if self.factors:
            return {name: (shapes[pair["B"]][0], shapes[pair["A"]][1]) for name, pair in self.factors.items()}
        return {name: shapes[stored] for name, stored in self.plain.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype in which a weight is stored."""
        return self.stored.dtypes[self.factors[name]["B"] if name in self.factors else self.plain[name]]

    def product(self, name: str, rows: slice = ALL) -> Tensor:
        """Rows of the update that LoRA factors make, in float64."""
        assert self.lora_scale is not None
        b, a = (self.stored.read(self.factors[name]["B"], rows), self.stored.read(self.factors[name]["A"]))
        return self.lora_scale * b.double() @ a.double()


@dataclass(frozen=True)
class WeightUpdates:
    """The updates of a run, in the order of their steps.

    Args:
        start: The weights before the first step; None where no point needs them (a fresh adapter adds 0).
        points: The points after it, by increasing step.
        pattern: A regular expression that is searched in the names of the matrices wanted.

    Raises:
        ValueError: Points or start do not fit each other, or no matrix is left.
    """

    start: WeightPoint | None
    points: Sequence[WeightPoint]
    pattern: str = ""
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        last = self.points[-1]
        needs_start = not last.holds_updates and not last.factors
        others = [*self.points[:-1], *([self.start] if self.start is not None and needs_start else [])]
        for point in others:
            _check_alike(point, last)
        known = {name: shape for name, shape in last.shapes.items() if all(name in each.shapes for each in others)}
        try:
            wanted = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"matrices: expected a regular expression, got {self.pattern!r} ({error}). Quote brackets as \\(."
            ) from error
        shapes = {name: shape for name, shape in known.items() if wanted.search(name)}
        if not any(len(shape) == 2 for shape in shapes.values()):
            some = ", ".join(sorted(name for name, shape in known.items() if len(shape) == 2)[:3])
            raise ValueError(
                f"matrices: {self.pattern!r} is found in none of the names of this run, such as {some or 'none'}."
            )
        object.__setattr__(self, "shapes", shapes)

    @property
    def steps(self) -> list[int]:
        """Optimiser steps done at every point."""
        return [point.step for point in self.points]

    @property
    def matrices(self) -> list[str]:
        """Names of the weights that have two axes, embeddings included, layer by layer."""
        names = [name for name, shape in self.shapes.items() if len(shape) == 2]
        return sorted(names, key=lambda name: (layer_of(name) is None, layer_of(name) or 0, name))

    def update(self, index: int, name: str, rows: slice = ALL) -> Tensor:
        """Rows of W - W_0 at a point, in float64.

        The start takes on the dtype of the point first: a student that was loaded in bfloat16 started from rounded
        weights, and one that was exported in bfloat16 is compared with what not having moved would look like.
        """
        point, start = self.points[index], self.start
        if name in point.factors:
            change = point.product(name, rows)
            return change - start.product(name, rows) if start is not None and name in start.factors else change
        stored = point.stored.read(point.plain[name], rows)
        if point.holds_updates:
            return stored.double()
        assert start is not None
        before = start.stored.read(start.plain[name], rows).to(stored.dtype)
        return stored.double() - before.double()


def _check_alike(one: WeightPoint, other: WeightPoint) -> None:
    """Refuse two points whose matrices have other names or shapes.

    Tied weights stand under one name in exported folders and under two in checkpoints, so a name may be missing on one
    side if it is an embedding or the head.
    """
    for name in sorted(one.shapes.keys() | other.shapes.keys()):
        shapes = [point.shapes.get(name) for point in (one, other)]
        if shapes[0] == shapes[1] or (None in shapes and kind_of(name) == "embedding"):
            continue
        said = ["absent" if shape is None else list(shape) for shape in shapes]
        raise ValueError(
            f"run: {name} is {said[0]} in {str(one.stored.path)!r} and {said[1]} in {str(other.stored.path)!r}."
            " They belong to different models: take one out, or set --start to the weights that this run began with."
        )


def scale_of_adapter(folder: Path) -> float:
    """What a saved LoRA adapter multiplies its product with.

    Raises:
        ValueError: It is more than plain LoRA.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        scale = float(settings["lora_alpha"]) / int(settings["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"run: {str(folder / 'adapter_config.json')!r} is damaged or no adapter of LoRA ({error})."
            " Export the checkpoint again."
        ) from error
    for unusual in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save"):
        if settings.get(unusual):
            raise ValueError(
                f"run: the adapter in {str(folder)!r} has {unusual}, and only plain LoRA can be merged here. Export it"
                " with the adapter merged (opd-lightning export)."
            )
    return scale
