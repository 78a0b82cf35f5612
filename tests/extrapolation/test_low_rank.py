"""The step of a low-rank product against dense singular value decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.extrapolation import extrapolate_product
from opd_lightning.extrapolation.low_rank import find_pairs


def make_pairs(seed, rank, num_in, num_out, kind="generic", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a_0, b_0 = draw(rank, num_in), draw(num_out, rank)
    a_0, b_0 = {"b starts at 0": (a_0, 0 * b_0), "a starts at 0": (0 * a_0, b_0)}.get(kind, (a_0, b_0))
    a, b = a_0 + 0.1 * draw(rank, num_in), b_0 + 0.1 * draw(num_out, rank)
    if kind == "b half used":
        b[:, : rank // 2], b_0[:, : rank // 2] = 0, 0
    return tuple(tensor.to(dtype) for tensor in (a, b, a_0, b_0))


def dense(a, b, a_0, b_0, factor, rank):
    """The best rank-r approximation of the extrapolated product, formed in full."""
    target = b @ a + factor * (b @ a - b_0 @ a_0)
    u, s, v_t = torch.linalg.svd(target, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v_t[:rank]


KINDS = ["generic", "b starts at 0", "a starts at 0", "b half used"]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(2, 12),
    st.integers(2, 12),
    st.sampled_from(KINDS),
    st.sampled_from([0.5, 2.0, 10.0, -0.5, -1.0, 0.0]),
)
def test_is_the_dense_truncation(seed, rank, num_in, num_out, kind, factor):
    pairs = make_pairs(seed, rank, num_in, num_out, kind)
    a, b = extrapolate_product(*pairs, factor)
    expected = dense(*pairs, factor, rank)
    assert a.shape == (rank, num_in)
    assert b.shape == (num_out, rank)
    torch.testing.assert_close(b @ a, expected, rtol=1e-7, atol=1e-9 * max(1.0, float(expected.norm())))


@pytest.mark.parametrize("kind", KINDS)
def test_factor_zero_returns_the_pair_and_minus_one_the_older_pair(kind):
    a, b, a_0, b_0 = make_pairs(3, 4, 20, 30, kind)
    for factor, expected in ((0.0, (a, b)), (-1.0, (a_0, b_0))):
        for new, old in zip(extrapolate_product(a, b, a_0, b_0, factor), expected, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)


def test_a_fresh_adapter_grows_along_b():
    _, b, a_0, _ = make_pairs(0, 4, 20, 30, "b starts at 0")
    new_a, new_b = extrapolate_product(a_0, b, a_0, torch.zeros_like(b), 10.0)  # only B has moved
    torch.testing.assert_close(new_a, a_0)
    torch.testing.assert_close(new_b, 11 * b)


def test_small_moves_follow_the_factors():
    a, b, a_0, b_0 = make_pairs(1, 4, 20, 30)
    a, b = a_0 + 1e-4 * (a - a_0), b_0 + 1e-4 * (b - b_0)
    new_a, new_b = extrapolate_product(a, b, a_0, b_0, 2.0)
    assert (new_a - (a + 2 * (a - a_0))).norm() < 1e-2 * (a - a_0).norm()
    assert (new_b - (b + 2 * (b - b_0))).norm() < 1e-2 * (b - b_0).norm()


def test_low_precision_factors_are_rounded_once():
    pairs = make_pairs(5, 4, 16, 24, dtype=torch.bfloat16)
    exact = extrapolate_product(*(tensor.double() for tensor in pairs), 2.0)
    for new, reference in zip(extrapolate_product(*pairs, 2.0), exact, strict=True):
        assert new.dtype == torch.bfloat16
        assert torch.equal(new, reference.to(torch.bfloat16))


def test_pairs_are_found_by_name_and_shape():
    shapes = {
        "model.q.lora_A.default.weight": (4, 10),
        "model.q.lora_B.default.weight": (12, 4),
        "embed.lora_embedding_A.default": (4, 50),
        "embed.lora_embedding_B.default": (10, 4),
        "conv.lora_A.default.weight": (4, 3, 2, 2),
        "conv.lora_B.default.weight": (6, 4, 1, 1),
        "split.lora_A": (12, 10),  # one A for three projections: not a product of these two
        "split.lora_B": (30, 4),
        "alone.lora_A.weight": (4, 10),
        "explora_A.weight": (4, 4),
        "explora_B.weight": (4, 4),
    }
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert dict(find_pairs(parameters)) == {
        "model.q.lora_A.default.weight": "model.q.lora_B.default.weight",
        "embed.lora_embedding_A.default": "embed.lora_embedding_B.default",
    }
