"""The student's scores of one block, and the way back by hand: from the gradients of a few scores to all logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.objectives.blocks import Block
from opd_lightning.objectives.logprobs import LOG_ZERO
from opd_lightning.objectives.normalization import log_mass_outside
from opd_lightning.objectives.student_scores import StudentScores


class BlockStudent(StudentScores):
    """Answers from a block, and remembers what it answered: those are the leaves that a loss is differentiated in.

    Args:
        block: The n tokens.
    """

    def __init__(self, block: Block) -> None:
        self._block = block
        self._at: list[tuple[Tensor, Tensor]] = []  # ids and their scores
        self._full: Tensor | None = None
        self._outside: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, and ids and which of them count

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        scores = self._block.log_p.gather(-1, token_ids)
        scores = scores.masked_fill_(scores <= LOG_ZERO, -math.inf).requires_grad_()  # closed: no gradient flows there
        self._at.append((token_ids, scores))
        return scores

    @override
    def full(self) -> Tensor:
        if self._full is None:
            self._full = self._block.log_p.detach().requires_grad_()
        return self._full

    @override
    def log_mass_outside(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
        with torch.no_grad():
            scores = log_mass_outside(self._block.log_p, token_ids, mask)  # as the teacher's: equal where both agree
            scores = scores.masked_fill_(scores <= LOG_ZERO / 2, -math.inf)
        self._outside.append((scores.requires_grad_(), token_ids, mask))
        return scores

    @override
    def tempered(self) -> Tensor:
        return self._block.tempered

    def differentiate(self, losses: Tensor, out: Tensor) -> None:
        """Write the gradient of the losses' sum in the tempered logits to `out` [n, V].

        With g the gradient of one score log p(v), each logit gets g (1[it is v's] - p); the mass outside a set is in
        turn the sum of its tokens, each by its share.
        """
        leaves = [each for _, each in self._at] + [each for each, _, _ in self._outside]
        leaves += [] if self._full is None else [self._full]
        if not losses.requires_grad:
            out.zero_()
            return
        gradients = list(
            torch.autograd.grad(losses, leaves, torch.ones_like(losses), allow_unused=True, materialize_grads=True)
        )
        if self._full is not None:
            gradients[-1] = gradients[-1].masked_fill(self._full <= LOG_ZERO, 0.0)
        for place, (scores, _, mask) in enumerate(self._outside, len(self._at)):  # not where it is a constant
            gradients[place] = torch.where((scores > -math.inf) & mask.any(-1), gradients[place], 0.0)
        total = torch.stack([each if each.dim() == 1 else each.sum(-1) for each in gradients]).sum(0)
        torch.mul(self._block.p, -total[:, None], out=out)
        if self._full is not None:
            out += gradients[-1]
        for (ids, _), gradient in zip(self._at, gradients, strict=False):
            out.scatter_add_(-1, ids, gradient)
        for (scores, ids, mask), gradient in zip(self._outside, gradients[len(self._at) :], strict=False):
            out.addcmul_(self._shares_outside(scores, ids, mask), gradient[:, None])

    def _shares_outside(self, log_mass: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Shares [n, V] of the tokens in the mass outside a set, 0 inside; in the buffer "product"."""
        log_mass = log_mass.detach().clamp(min=LOG_ZERO)
        shares = torch.sub(self._block.log_p, log_mass[:, None], out=self._block.buffer("product"))
        # a closed slot may name a token that is open in another: the smaller value wins
        closing = torch.where(mask, 10 * LOG_ZERO, math.inf).to(shares)
        return shares.scatter_reduce_(-1, ids, closing, "amin").exp_()
