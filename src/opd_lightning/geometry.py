"""Size, spectrum, effective rank and subspace angles of weights and their changes; and what chance alone would give.

Pure functions of tensors, in float64: a weight change is a small difference of large numbers, and its small singular
values are many. Definitions are those of arXiv 2605.11739, sections 2 and 3, unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """What the singular values s of a change [m, n] say; r = min(m, n) of them. A change of 0 has NaN for all shares.

    Attributes:
        frobenius: sqrt(sum s^2).
        spectral: The largest, s_1.
        spectral_share: s_1 / Frobenius: 1 for rank one, 1 / sqrt(r) for equal singular values.
        effective_rank: exp(-sum p log p) with p = s / sum s. Of s and not of s^2, which gives smaller
            numbers.
        top_share: sqrt(sum of the first ceil(r / 100) s^2) / Frobenius. A share of the norm and not of its square. Up
            to r = 100 it is `spectral_share`.
        rank: Singular values above rounding.
        stable_rank: Frobenius^2 / s_1^2 (arXiv 2606.07082): between 1 and the rank, and deaf to small singular values.
    """

    frobenius: float
    spectral: float
    spectral_share: float
    effective_rank: float
    top_share: float
    rank: int
    stable_rank: float


@dataclass(frozen=True)
class Decomposition:
    """All singular values [r], the largest first, and the singular vectors of the K largest.

    Attributes:
        values: [r].
        left: [m, K] orthonormal columns; columns of zeros for singular values of 0.
        right: [n, K], likewise.
    """

    values: Tensor
    left: Tensor
    right: Tensor


def decompose(change: Tensor, k: int = 20) -> Decomposition:
    """Singular values of a matrix and the vectors of its k largest, from the smaller of its two Gram matrices.

    One symmetric eigenproblem of size r = min(m, n) in float64, several times faster than an SVD. Squaring costs digits
    at the small end: singular values below sqrt(r * 2.2e-16) of the largest (1e-6 at r = 4096) are rounding, and are
    set to 0. Weights in float32 know no more.

    Args:
        change: [m, n], finite.
        k: Pairs of singular vectors wanted; fewer where r is smaller.
    """
    if change.shape[0] > change.shape[1]:
        turned = decompose(change.T, k)
        return Decomposition(turned.values, left=turned.right, right=turned.left)
    matrix = change.double()
    scale = float(matrix.abs().max()) or 1.0  # the squares of steps of 1e-200 would vanish
    matrix = matrix / scale
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0), vectors.flip(1)
    rounding = len(squares) * torch.finfo(torch.float64).eps * squares[0]
    values = torch.where(squares > rounding, squares, 0.0).sqrt()
    k = min(k, len(values))
    is_there = values[:k] > 0
    left = vectors[:, :k] * is_there
    right, triangle = torch.linalg.qr(matrix.T @ left / torch.where(is_there, values[:k], 1.0))
    right = right * triangle.diagonal().sign() * is_there  # so that left * values @ right.T is the matrix again
    return Decomposition(values * scale, left, right)


def spectrum(values: Tensor) -> Spectrum:
    """Describe singular values [r], the largest first.

    Raises:
        ValueError: There are none.
    """
    if not len(values):
        raise ValueError("values: expected at least one singular value, got none.")
    values = values.double()
    frobenius, spectral = float(torch.linalg.vector_norm(values)), float(values[0])
    if frobenius == 0:
        return Spectrum(0.0, 0.0, math.nan, math.nan, math.nan, 0, math.nan)
    shares = values / values.sum()
    top = values[: math.ceil(len(values) / 100)]
    return Spectrum(
        frobenius=frobenius,
        spectral=spectral,
        spectral_share=spectral / frobenius,
        effective_rank=float(torch.special.entr(shares).sum().exp()),
        top_share=float(torch.linalg.vector_norm(top)) / frobenius,
        rank=int((values > 0).sum()),
        stable_rank=(frobenius / spectral) ** 2,
    )


def subspace_cosines(one: Tensor, other: Tensor) -> Tensor:
    """How much the spans of the first k columns agree, for k = 1..K: the root mean square cosine of their k angles.

    ``||A_k^T B_k||_F / sqrt(k)``: |cos| for k = 1, 1 for equal spans, 0 for orthogonal ones, and `chance_cosine` for
    unrelated ones, which is far from 0 in small matrices. Its square is the similarity of arXiv 2606.07082. The paper
    does not say which mean of the cosines it takes.

    Args:
        one: [m, K] orthonormal columns.
        other: [m, K] orthonormal columns.

    Returns:
        [K], for k = 1, 2, ...
    """
    squares = (one.double().T @ other.double()).square()
    of_leading_blocks = squares.cumsum(0).cumsum(1).diagonal()
    return (of_leading_blocks / torch.arange(1, len(squares) + 1)).clamp(0, 1).sqrt()


@dataclass(frozen=True)
class WeightShift:
    """How a matrix of weights differs from what it was, by the measures of arXiv 2606.07082.

    Attributes:
        unmoved: Share of entries that have not moved by more than bfloat16 resolves (`share_unmoved`).
        spectrum_shift: ||s(W) - s(W_0)|| / ||s(W_0)||: how far the singular values have moved.
        largest_angle: Of the principal angles between the leading k singular subspaces of both, in radians; the larger
            one of left and right.
        mean_angle: Mean of the k angles, left and right.
    """

    unmoved: float
    spectrum_shift: float
    largest_angle: float
    mean_angle: float


def weight_shift(before: Tensor, after: Tensor, k: int = 20) -> WeightShift:
    """Compare a matrix with what it was, [m, n] both.

    Args:
        before: W_0.
        after: W.
        k: Leading singular directions that are compared; fewer where the matrix has fewer.
    """
    one, other = decompose(before, k), decompose(after, k)
    scale = float(torch.linalg.vector_norm(one.values))
    shift = float(torch.linalg.vector_norm(other.values - one.values))
    angles = [principal_angles(a, b) for a, b in ((one.left, other.left), (one.right, other.right))]
    return WeightShift(
        unmoved=share_unmoved(before, after),
        spectrum_shift=shift / scale if scale > 0 else math.nan,
        largest_angle=max(float(each.max()) for each in angles),
        mean_angle=float(torch.cat(angles).mean()),
    )


def share_unmoved(before: Tensor, after: Tensor, threshold: float = 1e-3) -> float:
    """Share of entries with |w - w_0| <= threshold x the larger of both sizes.

    bfloat16 tells numbers apart that differ by 4e-3 of their size, so a smaller difference is one of its rounding. The
    threshold is that of arXiv 2606.07082; that it is relative is our reading.
    """
    one, other = before.double(), after.double()
    return float(((other - one).abs() <= threshold * torch.maximum(one.abs(), other.abs())).double().mean())


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """The angles between two subspaces, in radians, the smallest first.

    Small angles come from their sines, large ones from their cosines, as each is exact only there.

    Args:
        one: [m, K] orthonormal columns.
        other: [m, K] orthonormal columns.

    Returns:
        [K], from 0 to pi / 2.
    """
    one, other = one.double(), other.double()
    cosines = torch.linalg.svdvals(one.T @ other).clamp(0, 1)
    sines = torch.linalg.svdvals(other - one @ (one.T @ other)).flip(0).clamp(0, 1)
    return torch.where(cosines**2 < 0.5, torch.arccos(cosines), torch.arcsin(sines))


def projected(matrix: Tensor, basis: Tensor) -> Tensor:
    """What of the rows of a matrix [m, n] lies in the span of orthonormal columns [n, K]."""
    return (matrix @ basis) @ basis.T


def chance_cosine(k: int, size: int) -> float:
    """`subspace_cosines` of two random k-dimensional subspaces of a space of this size (root of the mean square)."""
    return math.sqrt(min(k, size) / size)


def cosines_to_last(gram: Tensor) -> Tensor:
    """Cosine of each of N changes with the last, from their inner products [N, N]; NaN for a change of 0."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = norms * norms[-1]
    return torch.where(scale > 0, gram[:, -1] / scale, math.nan).clamp(-1, 1)


def explained_variance(gram: Tensor) -> Tensor:
    """Share of a trajectory's variance in each of its principal components, the largest first.

    The points' own mean is taken off, so it makes no difference where they are measured from. Three points always lie
    in two components: below five or so the sum of the first two says nothing.

    Args:
        gram: [N, N] inner products of the N points (`random_walk_gram` for what a walk without direction gives).

    Returns:
        [N] shares that sum to 1; NaN when the points are one.
    """
    gram = gram.double()
    centred = gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()
    variances = torch.linalg.eigvalsh(centred).flip(0).clamp_min(0)
    total = variances.sum()
    is_one_point = total <= len(gram) * torch.finfo(torch.float64).eps * gram.diagonal().abs().max()
    return torch.full_like(variances, math.nan) if is_one_point else variances / total


def random_walk_gram(steps: Sequence[int]) -> Tensor:
    """Inner products of a random walk in a space of very many dimensions at these steps: min(t, u).

    Its first two components hold 76 % of the variance for many evenly spaced points (arXiv 1806.08805), and its cosine
    with its own end is sqrt(t / T): trajectories are to be compared with that, not with 0.
    """
    times = torch.tensor(steps, dtype=torch.float64)
    return torch.minimum(times[:, None], times[None, :])
