"""Which few prompts visit the states that all of them visit (arXiv 2609.04172, at second hand).

The states of a response are the teacher's last hidden states at its tokens. They are cut into cells; the coverage of
some prompts is the share of cells that their responses visit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_lightning.randomness import derive_seed

NUM_COMPONENTS = 32
NUM_ROUNDS = 25


def cells_of(states: Tensor, num_cells: int, seed: int = 0) -> Tensor:
    """The cell of each state: k-means on the states' leading principal components.

    Starts are drawn far apart (k-means++), and rounds are limited to 25.

    Args:
        states: [N, H].
        num_cells: Most cells; fewer where fewer states differ.
        seed: Decides the starts.

    Returns:
        int64 [N], numbers from 0.
    """
    points = states.double() - states.double().mean(0)
    _, vectors = torch.linalg.eigh(points.T @ points)
    points = points @ vectors.flip(1)[:, :NUM_COMPONENTS]
    generator = torch.Generator().manual_seed(derive_seed(seed, "cells"))
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    nearest = (points - centres).square().sum(-1)
    while len(centres) < num_cells and float(nearest.max()) > 1e-12 * float(points.square().sum(-1).max()):
        place = torch.multinomial(nearest, 1, generator=generator)
        centres = torch.cat([centres, points[place]])
        nearest = torch.minimum(nearest, (points - points[place]).square().sum(-1))
    cells = torch.cdist(points, centres).argmin(-1)
    for _ in range(NUM_ROUNDS):
        counts = cells.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, cells, points)
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], centres)
        moved = torch.cdist(points, centres).argmin(-1)
        if torch.equal(moved, cells):
            break
        cells = moved
    used = cells.bincount() > 0
    return (used.cumsum(0) - 1)[cells]


def coverage(visits: Sequence[set[int]], chosen: Sequence[int]) -> float:
    """Share of the cells visited by all that the chosen ones visit.

    Args:
        visits: Cells of each prompt; some prompt visits one.
        chosen: Indices of prompts.
    """
    everything = set().union(*visits)
    return len(set().union(*(visits[index] for index in chosen))) / len(everything)


def cover(visits: Sequence[set[int]]) -> list[tuple[int, float]]:
    """All prompts in the order in which each adds the most cells to those before it, and the coverage after each.

    The greedy order: its first n cover at least 1 - 1/e = 63 % of what the best n would. Of equals the earlier; prompts
    that add nothing come last.
    """
    everything = set().union(*visits)
    covered: set[int] = set()
    left = list(range(len(visits)))
    found = []
    while left:
        best = max(left, key=lambda index: (len(visits[index] - covered), -index))
        covered |= visits[best]
        left.remove(best)
        found.append((best, len(covered) / len(everything)))
    return found
