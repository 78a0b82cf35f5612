"""The exact step of a low-rank product B A, taken without forming it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

_FACTOR_A = re.compile(r"(?<![^.])lora_(embedding_)?A(?![^.])")
_MIN_RELATIVE_SIZE = 1e-3


def find_pairs(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of the LoRA factors (A [r, in], B [out, r]) that are both among the parameters.

    A pair is recognised by a part of its name (`lora_A` and `lora_B`, or `lora_embedding_A` and `lora_embedding_B`)
    and by its shapes; factors of convolutions have four axes and are not among them.
    """
    for name_a, a in parameters.items():
        name_b = _FACTOR_A.sub(lambda match: match.group()[:-1] + "B", name_a)
        b = parameters.get(name_b)
        if b is not None and b is not a and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]:
            yield name_a, name_b


def extrapolate_product(a: Tensor, b: Tensor, a_0: Tensor, b_0: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-r approximation of `B A + factor (B A - B_0 A_0)`.

    Both products together have rank at most 2r: two QR decompositions of stacked factors and one SVD of a 2r x 2r
    matrix give the singular value decomposition of the target, and the cut at rank r loses the least possible in the
    Frobenius norm. Cost O((in + out) r^2), whatever in * out is; arithmetic in float64.

    Many pairs of factors have the same product, and Adam's moments belong to the coordinates of the current one. So
    the new pair is chosen close to where the factors themselves point: `A + factor (A - A_0)` is projected onto the
    new row space, and B follows. Hence `factor = 0` gives the current pair and `factor = -1` the older one.
    Directions in which the projection nearly vanishes are kept at 1/1000 of the largest one; that bounds B and leaves
    the product as it is.

    Args:
        a: Current A [r, in].
        b: Current B [out, r].
        a_0: Older A [r, in].
        b_0: Older B [out, r].
        factor: Multiple of the product's change to add.

    Returns:
        The new A [r, in] and B [out, r], in the dtypes of the old ones.
    """
    if factor == -1:
        return a_0.clone(), b_0.clone()  # also where A_0 = 0, from which no projection finds the way back to B_0
    rank = a.shape[0]
    double = torch.float32 if a.device.type == "mps" else torch.float64
    basis_in, inner_in = torch.linalg.qr(torch.cat([a, a_0]).to(double).T)
    basis_out, inner_out = torch.linalg.qr(torch.cat([b, b_0], dim=1).to(double))
    weight = torch.full((2 * rank,), -factor, dtype=double, device=a.device)
    weight[:rank] = 1 + factor
    inner_out = inner_out * weight
    u, s, v_t = torch.linalg.svd(inner_out @ inner_in.T, full_matrices=False)

    rounding = 2 * rank * torch.finfo(double).eps * inner_out.norm() * inner_in.norm()
    num_kept = min(rank, int((s > rounding).sum()))
    u, s, rows = u[:, :num_kept], s[:num_kept], v_t[:num_kept]
    target = (inner_in * weight).T.unflatten(0, (2, rank)).sum(0)  # A + factor (A - A_0), in terms of basis_in
    if num_kept < rank:  # directions that B does not use yet: keep A there, training will need it
        rest = torch.linalg.svd(target - target @ rows.T @ rows, full_matrices=False)[2]
        rows = torch.cat([rows, rest[: min(rank, target.shape[1]) - num_kept]])
    left, size, right = torch.linalg.svd(target @ rows.T, full_matrices=False)
    size = size.clamp_min(_MIN_RELATIVE_SIZE * size.max()).clamp_min(torch.finfo(a.dtype).tiny)
    new_a = (left * size) @ right @ rows
    new_b = (u * s) @ (right.T / size @ left.T)[:num_kept]
    return (new_a @ basis_in.T).to(a.dtype), (basis_out @ new_b).to(b.dtype)
