"""Sizes and angles of weight changes against references that are slow and obvious."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.geometry import (
    chance_cosine,
    cosines_to_last,
    decompose,
    explained_variance,
    principal_angles,
    projected,
    random_walk_gram,
    share_unmoved,
    spectrum,
    subspace_cosines,
    weight_shift,
)


def matrix(rows, columns, seed, rank=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return scale * torch.randn(rows, columns, generator=generator).double()
    factors = (torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))
    return scale * (factors[0].double() @ factors[1].double())


matrices = st.builds(
    matrix, st.integers(1, 24), st.integers(1, 24), st.integers(0, 99), scale=st.sampled_from([1e-100, 1e-7, 1.0, 1e9])
)


@settings(max_examples=40)
@given(matrices)
def test_values_and_vectors_are_those_of_an_svd(change):
    found = decompose(change, 5)
    expected = np.linalg.svd(change.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-6, atol=1e-7 * expected[0])
    k = min(5, *change.shape)
    assert found.left.shape == (change.shape[0], k) and found.right.shape == (change.shape[1], k)
    u, s, v_t = torch.linalg.svd(change.double(), full_matrices=False)
    if k == min(change.shape):
        best = change.double()
    elif s[k] < 0.99 * s[k - 1]:  # else the cut is not unique
        best = u[:, :k] * s[:k] @ v_t[:k]
    else:
        return
    torch.testing.assert_close(found.left * found.values[:k] @ found.right.T, best, rtol=1e-5, atol=1e-6 * expected[0])


@settings(max_examples=40)
@given(matrices)
def test_a_spectrum_is_described_as_the_paper_defines_it(change):
    s = np.linalg.svd(change.double().numpy(), compute_uv=False)
    found = spectrum(torch.from_numpy(s.copy()))
    p = s / s.sum()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    top = s[: math.ceil(len(s) / 100)]
    assert found.frobenius == pytest.approx(float(change.double().norm()))
    assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(change.double(), 2)))
    assert found.spectral_share == pytest.approx(found.spectral / found.frobenius)
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert found.top_share == pytest.approx(math.sqrt((top**2).sum() / (s**2).sum()))
    assert 1 - 1e-9 <= found.effective_rank <= found.rank * (1 + 1e-9) <= min(change.shape) * (1 + 1e-9)
    assert found.spectral_share <= 1 + 1e-9 and found.spectral_share**2 * found.rank >= 1 - 1e-9


def test_what_is_known_by_heart():
    equal = spectrum(torch.ones(250))
    assert (equal.spectral_share, equal.effective_rank, equal.rank) == (
        pytest.approx(1 / math.sqrt(250)),
        pytest.approx(250),
        250,
    )
    assert equal.top_share == pytest.approx(math.sqrt(3 / 250))  # ceil(2.5) of them, and the root of their energy
    one = spectrum(torch.tensor([2.0, 0, 0]))
    assert (one.spectral_share, one.effective_rank, one.top_share, one.rank) == (1, 1, 1, 1)
    nothing = spectrum(torch.zeros(3))
    assert nothing.frobenius == nothing.rank == 0 and math.isnan(nothing.effective_rank + nothing.top_share)
    assert spectrum(decompose(torch.zeros(4, 3)).values).rank == 0
    with pytest.raises(ValueError, match="at least one singular value"):
        spectrum(torch.zeros(0))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_product_of_low_rank_has_that_rank_to_the_last_digit(rank):
    found = decompose(matrix(60, 90, 0, rank), 20)
    assert spectrum(found.values).rank == rank
    assert found.left[:, rank:].abs().max() == found.right[:, rank:].abs().max() == 0
    torch.testing.assert_close(
        found.right[:, :rank].T @ found.right[:, :rank], torch.eye(rank, dtype=torch.float64), atol=1e-9, rtol=0
    )


@settings(max_examples=30)
@given(st.integers(6, 30), st.integers(1, 6), st.integers(0, 99))
def test_subspace_cosines_are_those_of_the_principal_angles(size, k, seed):
    one = torch.linalg.qr(matrix(size, k, seed).double()).Q
    other = torch.linalg.qr(matrix(size, k, seed + 1000).double()).Q
    for j, found in enumerate(subspace_cosines(one, other).tolist(), start=1):
        angles = np.linalg.svd((one[:, :j].T @ other[:, :j]).numpy(), compute_uv=False)
        assert found == pytest.approx(math.sqrt((angles**2).mean()), abs=1e-9)
    turn = torch.linalg.qr(matrix(k, k, seed).double()).Q
    assert float(subspace_cosines(one, one @ turn)[-1]) == pytest.approx(1)  # the span counts, not its basis


def test_unrelated_subspaces_have_the_cosine_of_chance():
    squares = torch.zeros(4, dtype=torch.float64)
    for seed in range(300):
        one, other = (torch.linalg.qr(matrix(16, 4, 2 * seed + i).double()).Q for i in (0, 1))
        squares += subspace_cosines(one, other).square()
    expected = [chance_cosine(k, 16) for k in range(1, 5)]
    assert (squares / 300).sqrt().tolist() == pytest.approx(expected, rel=0.1)
    assert chance_cosine(20, 8) == 1  # there is no room to differ


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 99))
def test_variance_is_that_of_a_principal_component_analysis(num_points, size, seed):
    points = matrix(num_points, size, seed).double()
    centred = points - points.mean(0)
    expected = torch.linalg.svdvals(centred).square()
    found = explained_variance(points @ points.T)
    torch.testing.assert_close(found[: len(expected)], expected / expected.sum(), atol=1e-9, rtol=1e-6)
    moved = points + 3.0  # another origin, the same trajectory
    torch.testing.assert_close(explained_variance(moved @ moved.T), found, atol=1e-9, rtol=1e-6)


def test_cosines_with_the_last_change():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [-1, 0, 0], [3, 0, 0]]).double()
    found = cosines_to_last(points @ points.T).tolist()
    assert math.isnan(found[0]) and found[1:] == [1, 0, -1, 1]
    assert explained_variance(torch.zeros(3, 3)).isnan().all()


def test_a_walk_without_direction_has_three_quarters_of_its_variance_in_two_components():
    gram = random_walk_gram(range(400))
    assert float(explained_variance(gram)[:2].sum()) == pytest.approx(6 / math.pi**2 * (1 + 1 / 4), abs=0.002)
    assert float(cosines_to_last(random_walk_gram([0, 25, 100]))[1]) == pytest.approx(0.5)
    walk = torch.randn(60, 20000, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    expected = explained_variance(random_walk_gram(range(1, 61)))[:2].sum()
    assert float(explained_variance(walk @ walk.T)[:2].sum()) == pytest.approx(float(expected), abs=0.02)


@settings(max_examples=30)
@given(matrices)
def test_the_stable_rank_is_between_1_and_the_rank(change):
    found = spectrum(decompose(change).values)
    assert 1 - 1e-9 <= found.stable_rank <= found.rank * (1 + 1e-9)
    exact = change.double() / change.abs().max()
    reference = float(torch.linalg.matrix_norm(exact) ** 2 / torch.linalg.matrix_norm(exact, 2) ** 2)
    assert found.stable_rank == pytest.approx(reference, rel=1e-6)
    assert math.isnan(spectrum(torch.zeros(3)).stable_rank)


def test_principal_angles_are_those_of_planes_turned_by_known_angles():
    turns = torch.tensor([1e-9, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    axes = torch.eye(9, dtype=torch.float64)
    one, other = axes[:, :4], axes[:, :4] * turns.cos() + axes[:, 4:8] * turns.sin()
    mixing = torch.linalg.qr(matrix(4, 4, 0)).Q
    found = principal_angles(one @ mixing, other @ mixing.T)
    torch.testing.assert_close(found, turns, rtol=1e-6, atol=1e-15)
    cosines = subspace_cosines(one, other)
    assert float(cosines[-1]) ** 2 == pytest.approx(float(turns.cos().square().mean()))


def test_weights_that_stand_still_have_no_shift_and_scaled_ones_no_angle():
    before = matrix(12, 8, 1)
    still = weight_shift(before, before.clone(), 4)
    assert (still.unmoved, still.spectrum_shift) == (1, 0)
    assert still.largest_angle < 1e-6
    scaled = weight_shift(before, 1.5 * before, 4)
    assert scaled.unmoved == 0 and scaled.spectrum_shift == pytest.approx(0.5) and scaled.largest_angle < 1e-6
    turned = weight_shift(before, torch.linalg.qr(matrix(12, 12, 2)).Q @ before, 4)
    assert turned.spectrum_shift == pytest.approx(0, abs=1e-9) and turned.largest_angle > 0.5 > 0
    assert turned.mean_angle <= turned.largest_angle


def test_what_bfloat16_rounds_away_has_not_moved():
    before = torch.tensor([1.0, -2.0, 0.0, 4.0])
    after = torch.tensor([1.0009, -2.01, 0.0, 4.0])
    assert share_unmoved(before, after) == 0.75
    assert share_unmoved(before, after, threshold=0.1) == 1
    assert share_unmoved(torch.zeros(1), torch.tensor([1e-9])) == 0


def test_a_projection_is_idempotent_and_onto_everything_changes_nothing():
    gradient, basis = matrix(5, 8, 3), torch.linalg.qr(matrix(8, 3, 4)).Q
    once = projected(gradient, basis)
    torch.testing.assert_close(projected(once, basis), once)
    torch.testing.assert_close(projected(gradient, torch.linalg.qr(matrix(8, 8, 5)).Q), gradient)
