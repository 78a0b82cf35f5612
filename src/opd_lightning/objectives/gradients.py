"""Losses, and their gradient in the logits: by formula, through a few scores, or by autograd of a whole chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Objective, ResponseTokens, TeacherScores
from opd_lightning.objectives.block_scores import BlockStudent
from opd_lightning.objectives.blocks import Block
from opd_lightning.objectives.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from opd_lightning.objectives.estimators import Direct
from opd_lightning.objectives.logprobs import LOG_ZERO
from opd_lightning.objectives.objective import DivergenceObjective
from opd_lightning.objectives.student_scores import ScoreObjective
from opd_lightning.objectives.supports import FullVocabulary


class GradientRule(ABC):
    """Losses of a block of tokens, and their gradient.

    Attributes:
        takes_whole_chunks: Whether it must see the chunks that `chunk_tokens` cuts, not smaller blocks of them.
        reads_tokens: Whether it reads more than the block; otherwise teacher and tokens are not cut for it.
    """

    takes_whole_chunks: bool = False
    reads_tokens: bool = True

    @property
    def factor(self) -> float:
        """What the gradient that is written must still be multiplied by."""
        return 1.0

    @abstractmethod
    def __call__(
        self, block: Block, teacher: TeacherScores | None, tokens: ResponseTokens, out: Tensor | None
    ) -> Tensor:
        """Losses [n], without gradient.

        Args:
            block: The n tokens.
            teacher: Its scores of them; None where the losses need none.
            tokens: The n tokens.
            out: [n, V], where the gradient of the losses' sum in the (untempered) logits goes, up to `factor`; may be
                the memory of `block.logits`, so it is written last. None computes no gradient.
        """


def gradient_rule(objective: Objective) -> GradientRule:
    """The fastest rule that gives exactly the gradient of the objective's `token_losses`."""
    # a subclass that changes what its losses are computed from is taken at its word
    if not isinstance(objective, ScoreObjective) or type(objective).token_losses is not ScoreObjective.token_losses:
        return ByAutograd(objective)
    if type(objective).losses_from is DivergenceObjective.losses_from:
        assert isinstance(objective, DivergenceObjective)
        is_direct, divergence = type(objective.estimator) is Direct, objective.divergence
        if isinstance(divergence, JensenShannon) and divergence.beta in (0, 1):
            divergence = ReverseKL() if divergence.beta == 1 else ForwardKL()
        if is_direct and type(objective.support) is FullVocabulary and type(divergence) in _FORMULAS:
            return WholeVocabulary(divergence, objective.student_temperature)
    return ThroughScores(objective, objective.student_temperature)


@dataclass(frozen=True)
class WholeVocabulary(GradientRule):
    """A divergence of the whole distributions, by its formula.

    Args:
        divergence: One of those in `_FORMULAS`.
        temperature: Of the student.
    """

    divergence: Divergence
    temperature: float
    reads_tokens = False

    @property
    @override
    def factor(self) -> float:
        """The temperature divides the logits."""
        return 1 / self.temperature

    @override
    def __call__(
        self, block: Block, teacher: TeacherScores | None, tokens: ResponseTokens, out: Tensor | None
    ) -> Tensor:
        return _FORMULAS[type(self.divergence)](self.divergence, block, out)


def _reverse_kl(divergence: Divergence, block: Block, out: Tensor | None) -> Tensor:
    """Gradient p (log p/q - KL)."""
    if out is not None:
        torch.addcmul(block.reverse_terms, block.p, block.reverse_kl[:, None], value=-1, out=out)
    return block.reverse_kl


def _forward_kl(divergence: Divergence, block: Block, out: Tensor | None) -> Tensor:
    """Gradient p sum(q) - q, where tokens that the student excludes take no part; exactly 0 where both agree."""
    losses = block.forward_kl
    if out is not None:
        q = block.q.masked_fill_(block.log_p <= LOG_ZERO, 0.0)
        mass = q.sum(-1, keepdim=True)
        torch.mul(block.p, mass, out=out).sub_(q).mul_(~block.agrees[:, None])
    return losses


def _jensen_shannon(divergence: Divergence, block: Block, out: Tensor | None) -> Tensor:
    """Gradient p (r - sum of p r) with r = (1 - b) log p/m, exactly 0 where both agree."""
    assert isinstance(divergence, JensenShannon)
    beta, tiny = divergence.beta, torch.finfo(block.p.dtype).tiny
    log_m = torch.mul(block.p, 1 - beta, out=block.buffer("mixture")).add_(block.q, alpha=beta).clamp_(min=tiny).log_()
    teachers = block.dot(block.q, torch.sub(block.log_q, log_m, out=block.buffer("product")))
    log_shares = torch.sub(block.log_p, log_m, out=log_m)
    terms = torch.mul(block.p, log_shares, out=block.buffer("product"))
    students = terms.sum(-1)
    if out is not None:
        scale = (1 - beta) * ~block.agrees[:, None]
        torch.addcmul(terms, block.p, students[:, None], value=-1, out=out).mul_(scale)
    return beta * teachers + (1 - beta) * students


_FORMULAS = {ReverseKL: _reverse_kl, ForwardKL: _forward_kl, JensenShannon: _jensen_shannon}


@dataclass(frozen=True)
class ThroughScores(GradientRule):
    """Losses that read a few scores of each token: autograd over these, and from there to the logits by formula.

    Args:
        objective: Gives the losses.
        temperature: Of the student.
    """

    objective: ScoreObjective
    temperature: float

    @property
    @override
    def factor(self) -> float:
        """The temperature divides the logits."""
        return 1 / self.temperature

    @override
    def __call__(
        self, block: Block, teacher: TeacherScores | None, tokens: ResponseTokens, out: Tensor | None
    ) -> Tensor:
        student = BlockStudent(block)
        with torch.set_grad_enabled(out is not None):
            losses = self.objective.losses_from(student, teacher, tokens)
        if out is not None:
            student.differentiate(losses, out)
        return losses.detach()


@dataclass(frozen=True)
class ByAutograd(GradientRule):
    """Any objective: its losses of a chunk are differentiated while its logits are there.

    Args:
        objective: Gives the losses.
    """

    objective: Objective
    takes_whole_chunks = True

    @override
    def __call__(
        self, block: Block, teacher: TeacherScores | None, tokens: ResponseTokens, out: Tensor | None
    ) -> Tensor:
        with torch.set_grad_enabled(out is not None):
            logits = block.logits.detach().requires_grad_(out is not None)
            losses = self.objective.token_losses(logits, teacher, tokens)
        if out is not None and losses.requires_grad:
            out.copy_(torch.autograd.grad(losses, logits, torch.ones_like(losses))[0])
        elif out is not None:
            out.zero_()
        return losses.detach()
