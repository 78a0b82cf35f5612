"""Losses and facts of many response tokens without ever holding all their logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.interfaces import LinearHead, Objective, ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives.head_products import HeadGradients
from opd_lightning.objectives.one_pass import OnePass, Question, Wanted


@dataclass(frozen=True)
class TokenResults:
    """What N response tokens cost, and what is known about them.

    Attributes:
        losses: [N] with gradient, nats; not weighted, not divided by anything.
        facts: float32 [N] each, without gradient, by name; empty when none were asked for.
    """

    losses: Tensor
    facts: dict[str, Tensor]


def compare_in_chunks(
    hidden: Tensor,
    head: LinearHead,
    objective: Objective,
    teacher: TeacherScores | None,
    tokens: ResponseTokens,
    *,
    asked: ScoreRequest | None = None,
    facts_k: int = 0,
    counts_alike: bool = True,
) -> TokenResults:
    """Turn hidden states into losses, `objective.chunk_tokens` response tokens at a time.

    One chunk's logits are the most that exist at once. The gradients of the hidden states and of a trainable head are
    formed in the same pass, so that the backward pass has only to scale them: by one factor where all losses count
    alike, as in their sum or mean. Losses that count differently scale the gradient of each token's hidden state too,
    but the head's is then formed by a second pass in the backward pass: how much a token counts may depend on what the
    first one finds out.

    A single backward pass collects the gradients of all chunks (tied heads and DDP included). An empty batch gives
    losses that still reach every parameter, so that no rank of a DDP group waits for it.

    Args:
        hidden: [N, H] final hidden states, with gradient.
        head: Turns hidden states into untempered float32 logits.
        objective: Gives the token losses; the loss of a token reads that token's logits only.
        teacher: Scores of the N tokens; None without a teacher.
        tokens: The N tokens.
        asked: What the teacher was asked for; facts are computed from that.
        facts_k: Size of the top-k lists of the facts; 0 computes none.
        counts_alike: Whether the caller will sum up the losses as they are. If it says so and does not, gradients are
            still right, and the work of the first pass on the head's is lost.
    """
    question = Question(objective, teacher, tokens, asked, facts_k)
    if not torch.is_grad_enabled() or not any(
        each is not None and each.requires_grad for each in (hidden, head.weight, head.bias)
    ):
        return TokenResults(*OnePass(question, hidden, head, None).run())
    facts: dict[str, Tensor] = {}
    losses: Tensor = _Compared.apply(hidden, head.weight, head.bias, head, question, counts_alike, facts)  # type: ignore[no-untyped-call]
    return TokenResults(losses, facts)


class _Compared(torch.autograd.Function):
    """Losses whose gradients are known when they are, up to what the losses are multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LinearHead,
        question: Question,
        counts_alike: bool,
        facts: dict[str, Tensor],
    ) -> Tensor:
        _, weight_needs, bias_needs = ctx.needs_input_grad[:3]
        ctx.trains_head = weight_needs or bias_needs
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.question = replace(head, weight=weight.detach(), bias=None), replace(question, facts_k=0)
        ctx.surroundings = _Surroundings(hidden.device)
        is_known = counts_alike or not ctx.trains_head
        once = OnePass(question, hidden, head, Wanted(weight_needs, bias_needs) if is_known else None)
        losses, known = once.run()
        facts.update(known)
        ctx.gradients = once.gradients
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (outer_gradient,) = outer
        hidden, weight, bias = ctx.saved_tensors
        gradients: HeadGradients | None = ctx.gradients
        ctx.gradients = None  # scaled in place: another backward pass through the same losses computes them again
        each = outer_gradient[:, None]
        factor = _same_for_all(outer_gradient) if ctx.trains_head else None
        if gradients is None or (ctx.trains_head and factor is None):
            factors = outer_gradient if factor is None else None  # weights that are all 1 change no bit
            wanted = Wanted(ctx.needs_input_grad[1], ctx.needs_input_grad[2], factors)
            with ctx.surroundings.again():
                once = OnePass(ctx.question, hidden, replace(ctx.head, weight=weight, bias=bias), wanted)
                once.run()
            assert once.gradients is not None
            gradients = once.gradients
        finished = gradients.finish(each, factor)
        typed = [g if g is None else g.to(of.dtype) for g, of in zip(finished, (hidden, weight, bias), strict=True)]
        return *typed, None, None, None, None


class _Surroundings:
    """Random state and autocast as they are now, for doing the same again in the backward pass.

    Args:
        device: Where it happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_autocast, self._dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self._random = torch.get_rng_state()
        self._random_on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """As they were."""
        on_device = [] if self._random_on_device is None else [self._device]
        with torch.random.fork_rng(on_device), torch.autocast(self._device.type, self._dtype, self._is_autocast):
            torch.set_rng_state(self._random)
            if self._random_on_device is not None:
                torch.cuda.set_rng_state(self._random_on_device, self._device)
            yield


def _same_for_all(gradient: Tensor) -> Tensor | None:
    """The one number that all entries of [N] are; None where they differ."""
    if gradient.numel() == 0:
        return torch.ones_like(gradient).sum()
    first = gradient[0]
    if gradient.stride() == (0,) or bool((gradient == first).all()):
        return first
    return None
