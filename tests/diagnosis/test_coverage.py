"""A few prompts in place of all: cells of states, and which prompts visit most of them."""

import random

import pytest
import torch

from opd_lightning.diagnosis.coverage import cells_of, cover, coverage


def test_clusters_that_lie_apart_are_cells():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(6, 40, generator=generator)
    labels = torch.randint(6, (300,), generator=generator)
    states = centres[labels] + 0.1 * torch.randn(300, 40, generator=generator)
    cells = cells_of(states, 6)
    assert len(set(zip(labels.tolist(), cells.tolist(), strict=True))) == 6 == len(cells.unique())
    assert torch.equal(cells_of(states, 6), cells)


def test_there_are_no_more_cells_than_different_states():
    assert cells_of(torch.eye(3).repeat(5, 1), 10).unique().tolist() == [0, 1, 2]
    assert cells_of(torch.ones(4, 2), 3).tolist() == [0, 0, 0, 0]


def random_visits(seed, num_prompts=20, num_cells=60):
    rng = random.Random(seed)
    return [set(rng.sample(range(num_cells), rng.randint(1, 12))) for _ in range(num_prompts)]


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_cover_is_never_below_random_ones_and_grows(seed):
    visits = random_visits(seed)
    order = cover(visits)
    shares = [share for _, share in order]
    assert sorted(index for index, _ in order) == list(range(len(visits)))
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
    for n in (1, 3, 8):
        chosen = [index for index, _ in order[:n]]
        assert coverage(visits, chosen) == shares[n - 1]
        rng = random.Random(seed)
        drawn = [coverage(visits, rng.sample(range(len(visits)), n)) for _ in range(30)]
        assert sum(drawn) / 30 <= shares[n - 1]


def test_of_equals_the_earlier_and_what_adds_nothing_last():
    assert cover([{1}, {2, 3}, {4, 5}, {1, 2}]) == [(1, 0.4), (2, 0.8), (0, 1.0), (3, 1.0)]
    assert coverage([{1}, {2}], []) == 0
