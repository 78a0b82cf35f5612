"""The matrix products of a head, into memory that is used again: logits, and from their gradient that of its inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from opd_lightning.interfaces import LinearHead


def write_logits(head: LinearHead, hidden: Tensor, out: Tensor) -> None:
    """`LinearHead.__call__` without gradient: untempered logits of `hidden` [n, H], written to `out` [n, V].

    The product runs in the precision of its surroundings, everything after it in that of `out`.
    """
    weight = head.weight[: head.num_rows]
    bias = None if head.bias is None else head.bias[: head.num_rows]
    if torch.is_autocast_enabled(out.device.type) or not weight.dtype == hidden.dtype == out.dtype:
        out.copy_(linear(hidden, weight, bias))
    elif bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)
    if head.scale != 1:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)


def write_uncapped(softcap: float, logits: Tensor, gradient: Tensor) -> None:
    """Write over capped logits [n, V] what the soft-cap lets through of their gradient [n, V]."""
    logits.div_(softcap).square_().neg_().add_(1).mul_(gradient)


def in_surrounding_precision(head: LinearHead, device: str) -> LinearHead:
    """The head without gradient, its weight cast once, as autocast would cast it for every product."""
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return replace(head, weight=weight, bias=bias)


class HeadGradients:
    """Gradients of a head's inputs, summed over chunks: the sums in float32 at least.

    Args:
        head: As its products run (`in_surrounding_precision`).
        hidden: [N, H].
        wants_weight: Sum up the gradient of the weight.
        wants_bias: Sum up the gradient of the bias.
        factor: What the gradients of the logits that are added must still be multiplied by, the head's scale aside.
    """

    def __init__(self, head: LinearHead, hidden: Tensor, wants_weight: bool, wants_bias: bool, factor: float) -> None:
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        # float16 would lose what a gradient scaler saves only later
        self._dtype = wide if head.weight.dtype == torch.float16 else head.weight.dtype
        self._head = head
        self._factor = head.scale * factor  # multiplied in at the end, with what the losses are multiplied by
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros_like(head.weight, dtype=wide) if wants_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if wants_bias and head.bias is not None else None

    def add(self, gradient: Tensor, hidden: Tensor, rows: slice, factors: Tensor | None) -> None:
        """Add a chunk.

        Args:
            gradient: [n, V], of its logits.
            hidden: [n, H], of its tokens.
            rows: Where its tokens are.
            factors: [n], what the losses are multiplied by in the gradient of the head; None for 1.
        """
        num_rows = self._head.num_rows
        narrow = gradient.to(self._dtype)
        self.hidden[rows] = narrow @ self._head.weight[:num_rows].to(self._dtype)
        if factors is not None:
            hidden = hidden * factors[:, None]
        if self.weight is not None:
            if self.weight.dtype == self._dtype:
                self.weight[:num_rows].addmm_(narrow.T, hidden.to(self._dtype))
            else:
                self.weight[:num_rows] += narrow.T @ hidden.to(self._dtype)
        if self.bias is not None:
            self.bias[:num_rows] += gradient.sum(0) if factors is None else factors.to(gradient) @ gradient

    def finish(self, of_hidden: Tensor, of_head: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, once and for all.

        Args:
            of_hidden: Number or [N, 1], what that of the hidden states is multiplied by.
            of_head: Number, what the sums over tokens are multiplied by; None leaves them.
        """
        self.hidden.mul_(of_hidden * self._factor)
        for each in (self.weight, self.bias):
            if each is not None and (of_head is not None or self._factor != 1):
                each.mul_(self._factor if of_head is None else of_head * self._factor)
        return self.hidden, self.weight, self.bias
