"""Measure the updates of a run, one matrix after the other: spectra, lock-in of directions, shape of the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.geometry import (
    Decomposition,
    Spectrum,
    WeightShift,
    chance_cosine,
    cosines_to_last,
    decompose,
    explained_variance,
    random_walk_gram,
    spectrum,
    subspace_cosines,
    weight_shift,
)
from opd_lightning.training.weight_updates import WeightUpdates, kind_of, layer_of

AVERAGED = ("attention", "mlp")  # the matrices that the paper's figures are about
NUM_DIRECTIONS = 20
_ENTRIES_AT_ONCE = 2**22  # of all points together, when their inner products are taken: 32 MiB


@dataclass(frozen=True)
class MatrixGeometry:
    """One matrix at every point of the run.

    Attributes:
        name: As in the plain model.
        kind: "attention", "mlp", "embedding" or "other".
        layer: Number of its layer, if it has one.
        shape: [m, n].
        spectra: One per point; empty for embeddings, of which only sizes and cosines are known.
        frobenius: Size of the update at every point.
        unchanged: Share of entries that have not moved at all.
        cosine_to_last: Cosine of the whole update with that of the last point.
        subspace_cosines: For every point, at k = 1..20, of the top-k singular directions with those of the last point;
            left and right averaged as squares. Empty for embeddings.
        shift: The weights of the last point against those of the start; None for embeddings, and where the start's
            are not at hand.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    spectra: list[Spectrum]
    frobenius: list[float]
    unchanged: list[float]
    cosine_to_last: list[float]
    subspace_cosines: list[list[float]]
    shift: WeightShift | None = None


@dataclass(frozen=True)
class RunGeometry:
    """What a run's updates look like; see docs/analyze.md.

    Attributes:
        steps: Optimiser steps done at every point.
        matrices: Layer by layer.
        chance: Subspace cosine at k = 1..20 of unrelated matrices of the same shapes.
        cosine_to_last: Cosine of the update of all attention and MLP matrices with the last, at every point.
        variance: Shares of the trajectory's principal components, the start included.
        random_walk_cosine: What `cosine_to_last` would be for steps without a common direction.
        random_walk_variance: What `variance` would be for them.
    """

    steps: list[int]
    matrices: list[MatrixGeometry]
    chance: list[float]
    cosine_to_last: list[float]
    variance: list[float]
    random_walk_cosine: list[float]
    random_walk_variance: list[float]

    @property
    def averaged(self) -> list[MatrixGeometry]:
        """The attention and MLP matrices; all that have spectra where no name says which they are."""
        return [each for each in self.matrices if each.kind in AVERAGED] or [m for m in self.matrices if m.spectra]

    def mean_spectrum(self, point: int, kinds: Sequence[str] = AVERAGED, layer: int | None = None) -> dict[str, float]:
        """Means over matrices, each counted once, those that have not moved left out; `frobenius` is of all together.

        Args:
            point: Which point of the run.
            kinds: Kinds of matrices.
            layer: Only this one; None takes all.
        """
        chosen = [m for m in self.averaged if m.kind in kinds or kinds == AVERAGED]
        spectra = [m.spectra[point] for m in chosen if layer is None or m.layer == layer]
        names = ("spectral", "spectral_share", "effective_rank", "top_share", "rank", "stable_rank")
        means = {name: _mean(getattr(each, name) for each in spectra if each.frobenius > 0) for name in names}
        return {"frobenius": math.sqrt(sum(each.frobenius**2 for each in spectra)), **means}

    def mean_subspace_cosines(self, point: int) -> list[float]:
        """Mean over the averaged matrices at k = 1..20, of those that have so many directions."""
        curves = [each.subspace_cosines[point] for each in self.averaged]
        return [_mean(curve[k] for curve in curves if len(curve) > k) for k in range(max(map(len, curves)))]


def measure(
    updates: WeightUpdates, device: torch.device | None = None, progress: Callable[[str], None] = lambda name: None
) -> RunGeometry:
    """Measure every matrix of a run. At most one matrix is in memory, whatever their number and that of the points.

    Args:
        updates: The run.
        device: Where the singular values are computed.
        progress: Told of every matrix before it is measured.

    Raises:
        ValueError: An update holds NaN or infinity.
    """
    matrices: list[MatrixGeometry] = []
    total = torch.zeros(len(updates.points) + 1, len(updates.points) + 1, dtype=torch.float64)
    kinds = {kind_of(name) for name in updates.matrices}
    if kinds == {"embedding"}:
        raise ValueError(
            "matrices: expected some that are no embeddings, since these have too many rows for a spectrum."
        )
    for name in updates.matrices:
        progress(name)
        gram, unchanged = _inner_products(updates, name)
        spectra, cosines = ([], []) if kind_of(name) == "embedding" else _directions(updates, name, device)
        matrices.append(
            MatrixGeometry(
                name=name,
                kind=kind_of(name),
                layer=layer_of(name),
                shape=updates.shapes[name],
                spectra=spectra,
                frobenius=gram.diagonal().clamp_min(0).sqrt().tolist(),
                unchanged=unchanged,
                cosine_to_last=cosines_to_last(gram).tolist(),
                subspace_cosines=cosines,
                shift=_shift(updates, name, device) if spectra else None,
            )
        )
        if kind_of(name) in AVERAGED or not kinds & set(AVERAGED):
            total[1:, 1:] += gram  # the start is the origin: its inner products are 0
    walk = random_walk_gram([0, *updates.steps])
    return RunGeometry(
        steps=updates.steps,
        matrices=matrices,
        chance=_chance([m for m in matrices if m.spectra]),
        cosine_to_last=cosines_to_last(total[1:, 1:]).tolist(),
        variance=explained_variance(total).tolist(),
        random_walk_cosine=cosines_to_last(walk[1:, 1:]).tolist(),
        random_walk_variance=explained_variance(walk).tolist(),
    )


def _inner_products(updates: WeightUpdates, name: str) -> tuple[Tensor, list[float]]:
    """Inner products [N, N] of the updates of one matrix, and the share of entries that are 0, a few rows at a time."""
    num_rows, num_columns = updates.shapes[name]
    num_points = len(updates.points)
    gram = torch.zeros(num_points, num_points, dtype=torch.float64)
    num_zero = torch.zeros(num_points, dtype=torch.float64)
    height = max(1, _ENTRIES_AT_ONCE // (num_points * num_columns))
    for top in range(0, num_rows, height):
        rows = slice(top, min(top + height, num_rows))
        block = torch.empty(num_points, (rows.stop - top) * num_columns, dtype=torch.float64)
        for i in range(num_points):
            block[i] = updates.update(i, name, rows).flatten()
        gram += block @ block.T
        num_zero += (block == 0).sum(1)
    if not gram.isfinite().all():
        worst = updates.points[int((~gram.diagonal().isfinite()).double().argmax())]
        raise ValueError(
            f"run: {name} holds NaN or infinity in {str(worst.stored.path)!r}. The run diverged: take the points from"
            " there on out of the folder."
        )
    return gram, (num_zero / (num_rows * num_columns)).tolist()


def _directions(
    updates: WeightUpdates, name: str, device: torch.device | None
) -> tuple[list[Spectrum], list[list[float]]]:
    """Spectra of one matrix at every point, and the cosines of its top directions with those of the last."""
    spectra: list[Spectrum] = []
    cosines: list[list[float]] = []
    last = _decomposed(updates, len(updates.points) - 1, name, device)
    for i in range(len(updates.points)):
        here = last if i == len(updates.points) - 1 else _decomposed(updates, i, name, device)
        spectra.append(spectrum(here.values))
        squares = [subspace_cosines(a, b).square() for a, b in ((here.left, last.left), (here.right, last.right))]
        known = min(spectra[-1].rank, int((last.values > 0).sum()), NUM_DIRECTIONS)
        cosines.append((sum(squares) / 2).sqrt()[:known].tolist())  # type: ignore[union-attr]
    return spectra, cosines


def _shift(updates: WeightUpdates, name: str, device: torch.device | None) -> WeightShift | None:
    """The last point's weights of one matrix against the start's, where these are known."""
    if updates.start is None or name not in updates.start.plain:
        return None
    before = updates.start.stored.read(updates.start.plain[name]).double()
    after = before + updates.update(len(updates.points) - 1, name)
    return weight_shift(before.to(device), after.to(device), NUM_DIRECTIONS)


def _decomposed(updates: WeightUpdates, index: int, name: str, device: torch.device | None) -> Decomposition:
    found = decompose(updates.update(index, name).to(device), NUM_DIRECTIONS)
    return Decomposition(found.values.cpu(), found.left.cpu(), found.right.cpu())


def _chance(matrices: Sequence[MatrixGeometry]) -> list[float]:
    """Root of the mean over both sides and all matrices of the squared cosine of random subspaces."""
    curves = []
    for each in matrices:
        sides = [[chance_cosine(k, size) ** 2 for k in range(1, NUM_DIRECTIONS + 1)] for size in each.shape]
        curves.append([math.sqrt((a + b) / 2) for a, b in zip(*sides, strict=True)][: min(each.shape)])
    return [_mean(curve[k] for curve in curves if len(curve) > k) for k in range(max(map(len, curves), default=0))]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
