"""Counter-based randomness: golden values, uniformity, independence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning import randomness
from opd_lightning.randomness import derive_seed, hashed_uniforms, seed_generators

MASK = (1 << 64) - 1


def uniform_reference(seed: int, position: int) -> float:
    """The same hash in Python's unbounded integers."""

    def mix(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return bits ^ (bits >> 31)

    gamma = 0x9E3779B97F4A7C15
    mixed = mix((mix((seed + gamma) & MASK) + gamma * (position + 1)) & MASK)
    return ((mixed >> 16) + 0.5) / 2**48


def distance_from_uniform(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n); above 1.95 once in a thousand for uniform numbers."""
    ordered, count = values.flatten().sort().values, values.numel()
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()) * count**0.5


def test_golden_values_never_change():
    assert derive_seed() == 6510301506637419378
    assert derive_seed(0, "rollout", 3, 1, 0) == 3079381064790714129
    assert derive_seed(-1) == 7711259265045266901
    seeds = torch.tensor([0, 1, 2**63 - 1])
    assert hashed_uniforms(seeds, 0).tolist() == [0.6524484863740323, 0.3681895156516699, 0.41323623306268153]
    assert hashed_uniforms(seeds, 1000).tolist() == [0.6186972209020016, 0.80225235909551, 0.26014411659769543]


IN_ANOTHER_PROCESS = """
import runpy, sys, types
sys.modules["torch"] = types.SimpleNamespace(Tensor=None)  # takes seconds to import, and the hash does without
print(runpy.run_path(sys.argv[1])["derive_seed"](7, "train", "ü", 10**30))
"""


def test_derive_seed_is_the_same_in_another_process():
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, randomness.__file__]
    seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(seen) == derive_seed(7, "train", "ü", 10**30)


@given(st.lists(st.integers() | st.text(), max_size=5), st.lists(st.integers() | st.text(), max_size=5))
def test_different_parts_give_different_seeds(first, second):
    assert 0 <= derive_seed(*first) < 2**63
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@pytest.mark.parametrize("part", [1.0, None, True, torch.tensor(1)])
def test_only_integers_and_strings_name_a_seed(part):
    with pytest.raises(TypeError, match="expected integers and strings"):
        derive_seed(0, part)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8), st.integers(0, 10**6))
def test_uniforms_equal_the_hash_in_python_integers(seeds, position):
    expected = [uniform_reference(seed, position) for seed in seeds]
    assert hashed_uniforms(torch.tensor(seeds), position).tolist() == expected
    assert all(0 < value < 1 for value in expected)


def test_positions_broadcast_against_seeds():
    seeds, positions = torch.tensor([3, 2**63 - 1]), torch.tensor([0, 1, 500])
    expected = torch.stack([hashed_uniforms(seeds, int(position)) for position in positions], dim=1)
    assert torch.equal(hashed_uniforms(seeds[:, None], positions), expected)


def test_largest_uniform_keeps_below_a_rounded_total():
    total = torch.tensor([0.5, 1.0 - 2.0**-53, 1.0, 1.0 + 2.0**-52, 3.0], dtype=torch.float64)
    largest = (2**48 - 1 + 0.5) * 2.0**-48
    assert bool((largest * total < total).all())


@pytest.mark.parametrize("spacing", [1, 2, 2**32, 0x9E3779B97F4A7C15 >> 1])
def test_uniform_over_neighbouring_seeds_and_positions(spacing):
    seeds = torch.arange(300) * spacing & (2**63 - 1)
    values = torch.stack([hashed_uniforms(seeds, position) for position in range(300)])
    assert distance_from_uniform(values) < 1.95
    assert max(distance_from_uniform(row) for row in values) < 2.6
    assert max(distance_from_uniform(column) for column in values.T) < 2.6


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (-1, 1)])
def test_neighbours_are_independent(shift):
    values = torch.stack([hashed_uniforms(torch.arange(400), position) for position in range(400)])
    other = values.roll(shift, dims=(0, 1))[2:-2, 2:-2].flatten()
    values = values[2:-2, 2:-2].flatten()
    correlation = torch.corrcoef(torch.stack([values, other]))[0, 1]
    assert abs(correlation) < 4 / values.numel() ** 0.5
    # pairs fill the unit square evenly: chi-square of 16 x 16 cells, 255 degrees of freedom, one in 10^4 above 346
    counts = torch.bincount((values * 16).long() * 16 + (other * 16).long(), minlength=256).double()
    expected = values.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 346


def test_global_generators_are_seeded_as_torch_seeds_them():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = torch.rand(3)
        seed_generators(7, torch.device("cpu"))
        assert torch.equal(torch.rand(3), expected)
        assert torch.initial_seed() == 7
