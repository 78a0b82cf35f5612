"""What losses, facts and gradients are computed from: a few rows of both models' logits, small enough for the cache.

Every quantity is computed once, when it is first asked for, into memory that the next block uses again.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from opd_lightning.objectives.logprobs import LOG_ZERO


class Scratch:
    """Buffers [rows, V] by name, made when they are first needed and used again by every block.

    Args:
        like: [rows, V], of the dtype and on the device of the buffers.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, num_rows: int) -> Tensor:
        """The first rows of the buffer of that name, with whatever was last written there."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(self._like)
        return self._buffers[name][:num_rows]


class Block:
    """Both distributions of n response tokens, and the products and sums that losses and facts share.

    Log-probabilities are at least `LOG_ZERO`, so that nothing here is infinite.

    Args:
        logits: [n, V] of the student, untempered.
        temperature: Divides them.
        teacher: [n, V] of the teacher, tempered; None where only single scores of it are at hand.
        is_normalized: Whether `teacher` has log-probabilities, not logits.
        scratch: Holds what is computed; the last block's is lost.
    """

    def __init__(
        self, logits: Tensor, temperature: float, teacher: Tensor | None, is_normalized: bool, scratch: Scratch
    ) -> None:
        self.logits = logits
        self.temperature = temperature
        self._teacher = teacher
        self._is_normalized = is_normalized
        self._scratch = scratch

    def buffer(self, name: str) -> Tensor:
        """[n, V] to write to."""
        return self._scratch(name, len(self.logits))

    @cached_property
    def tempered(self) -> Tensor:
        """Tempered logits of the student."""
        if self.temperature == 1:
            return self.logits
        return torch.div(self.logits, self.temperature, out=self.buffer("tempered"))

    @cached_property
    def log_p(self) -> Tensor:
        """Log-probabilities of the student."""
        return torch.log_softmax(self.tempered, -1, out=self.buffer("log_p")).clamp_(min=LOG_ZERO)

    @cached_property
    def p(self) -> Tensor:
        """Probabilities of the student."""
        return torch.exp(self.log_p, out=self.buffer("p"))

    @cached_property
    def log_q(self) -> Tensor:
        """Log-probabilities of the teacher."""
        assert self._teacher is not None
        if self._is_normalized:
            return torch.clamp(self._teacher, min=LOG_ZERO, out=self.buffer("log_q"))
        return torch.log_softmax(self._teacher, -1, out=self.buffer("log_q")).clamp_(min=LOG_ZERO)

    @cached_property
    def q(self) -> Tensor:
        """Probabilities of the teacher."""
        return torch.exp(self.log_q, out=self.buffer("q"))

    @cached_property
    def log_ratio(self) -> Tensor:
        """Logarithm of p / q: exactly 0 where both agree."""
        return torch.sub(self.log_p, self.log_q, out=self.buffer("log_ratio"))

    @cached_property
    def reverse_terms(self) -> Tensor:
        """What the reverse KL sums up, p log(p / q)."""
        return torch.mul(self.p, self.log_ratio, out=self.buffer("reverse_terms"))

    @cached_property
    def reverse_kl(self) -> Tensor:
        """KL(p || q), [n]."""
        return self.reverse_terms.sum(-1)

    @cached_property
    def forward_kl(self) -> Tensor:
        """KL(q || p), [n]."""
        return -self.dot(self.q, self.log_ratio)

    @cached_property
    def student_entropy(self) -> Tensor:
        """H(p), [n]."""
        return -self.dot(self.p, self.log_p)

    @cached_property
    def teacher_entropy(self) -> Tensor:
        """H(q), [n]."""
        return -self.dot(self.q, self.log_q)

    @cached_property
    def agrees(self) -> Tensor:
        """Whether both distributions are the same to the last bit, bool [n]."""
        return (self.log_ratio.amax(-1) == 0) & (self.log_ratio.amin(-1) == 0)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums over the vocabulary of the product of two [n, V]; overwrites the buffer "product"."""
        return torch.mul(a, b, out=self.buffer("product")).sum(-1)
