"""Do the gradients of single rollouts add up, and which cheaper losses give the gradient of the exact one?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.diagnosis.measurements import Gradients, LossGradient
from opd_lightning.interfaces import MicroBatch, Objective, Rollout, ScoreRequest, Student, Teacher
from opd_lightning.objectives import (
    DivergenceObjective,
    FullVocabulary,
    SampledToken,
    SampledTokenObjective,
    StudentTopK,
    TeacherTopK,
    compare_in_chunks,
)
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.comparison import make_micro_batches

FULL = "full vocabulary"
SAMPLED = "sampled token"
OWN = "the run's own"
SIZES = (4, 16, 64)  # those of arXiv 2604.13016; its fourth, 1, is the likeliest token against all others
MOST_KEPT = 2**20


@dataclass
class GradientSums:
    """What is kept of the gradients g_i of one loss, beside the gradients f_i of the exact one.

    Attributes:
        total: float64 [M], sum of g_i.
        norms: ‖g_i‖ of each rollout.
        inner: Sum of <g_i, f_i>.
    """

    total: Tensor
    norms: list[float] = field(default_factory=list)
    inner: float = 0.0

    def add(self, gradient: Tensor, exact: Tensor | None) -> None:
        """Add the gradient of a rollout."""
        self.total += gradient
        self.norms.append(float(gradient.norm()))
        if exact is not None:
            self.inner += float(gradient @ exact)

    @property
    def squares(self) -> float:
        """Sum of ‖g_i‖²."""
        return math.fsum(norm**2 for norm in self.norms)

    @property
    def deviations(self) -> float:
        """Sum of ‖g_i - mean‖²."""
        return self.squares - float(self.total @ self.total) / len(self.norms)

    def describe(self, loss: str, k: int | None, num_tokens: int, exact: GradientSums | None) -> LossGradient:
        """The numbers of a loss; `exact` holds the full-vocabulary gradients of the same rollouts."""
        count, length, squares = len(self.norms), float(self.total.norm()), self.squares
        sum_of_norms = math.fsum(self.norms)
        is_zero = squares == 0
        signal = (length**2 - squares) / ((count - 1) * squares) if count > 1 and not is_zero else 0.0
        is_comparable = exact is not None and exact.squares > 0 and not is_zero
        cosine = variance = error = None
        if is_comparable:
            assert exact is not None
            lengths = length * float(exact.total.norm())
            cosine = float(self.total @ exact.total) / lengths if lengths > 0 else None
            variance = self.deviations / exact.deviations if exact.deviations > 0 else None
            error = (squares - 2 * self.inner + exact.squares) / exact.squares
        return LossGradient(
            loss=loss,
            k=k,
            norm=length / num_tokens,
            coherence=0.0 if is_zero else length / sum_of_norms,
            signal=signal,
            cosine=cosine,
            variance=variance,
            error=error,
        )


def losses_to_compare(
    objective: Objective, offer: ScoreRequest, vocab_size: int
) -> dict[str, tuple[Objective, int | None]]:
    """The losses whose gradients are compared, as far as the teacher can give what they ask for, each with its k.

    All are the reverse KL or estimate its gradient, at the temperatures of the run's objective.

    Args:
        objective: The run's own.
        offer: The most that the teacher gives.
        vocab_size: V; lists that hold the whole vocabulary are left out.
    """
    request = objective.request()
    settings: dict[str, Any] = {
        "student_temperature": objective.student_temperature,
        "teacher_temperature": request.temperature if request is not None else 1.0,
        "allow_biased_sampling": True,
    }
    found: dict[str, tuple[Objective, int | None]] = {OWN: (objective, None)}
    if offer.full_vocabulary:
        found[FULL] = (DivergenceObjective(FullVocabulary(), **settings), None)
    found[SAMPLED] = (SampledTokenObjective(importance=None, **settings), None)
    found["sampled token + tail"] = (DivergenceObjective(SampledToken(), **settings), None)
    if offer.arbitrary_ids:
        found["student top 1 + tail"] = (DivergenceObjective(StudentTopK(1, "tail"), **settings), 1)
    for k in (size for size in SIZES if size < vocab_size):
        if offer.arbitrary_ids:
            found[f"student top {k}"] = (DivergenceObjective(StudentTopK(k), **settings), k)
            found[f"student top {k} + tail"] = (DivergenceObjective(StudentTopK(k, "tail"), **settings), k)
        if offer.top_k >= k:
            found[f"teacher top {k} + tail"] = (DivergenceObjective(TeacherTopK(k, "tail"), **settings), k)
    return found


def measure_gradients(
    student: Student,
    model: nn.Module,
    rollouts: Sequence[Rollout],
    losses: Mapping[str, tuple[Objective, int | None]],
    teacher: Teacher,
    request: ScoreRequest,
    *,
    device: torch.device,
    max_tokens: int,
    seed: int = 0,
    most_kept: int = MOST_KEPT,
) -> Gradients:
    """Gradients of each loss, rollout by rollout, over the weights that are trained.

    One pass through the student for each rollout and one backward pass for each loss; memory for one gradient of all
    weights, and of `most_kept` weights for each loss. With more weights than that, the numbers are taken over weights
    drawn evenly from all of them: sums of products over them are unbiased up to a common factor.

    Args:
        student: How to run the model.
        model: The loaded student, in the mode and the precision that the caller wants.
        rollouts: At least one, shaped for the run's objective.
        losses: By name, each with its k; the exact one is called `FULL`.
        teacher: Scores the tokens.
        request: What it is asked; enough for all losses.
        device: Where the model is.
        max_tokens: Longest sequence that is accepted.
        seed: Decides which weights are kept.
        most_kept: Weights that the numbers are taken over.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    places = _drawn_places([weight.numel() for weight in weights], most_kept, seed)
    num_kept = sum(len(place) for place in places)
    sums = {name: GradientSums(torch.zeros(num_kept, dtype=torch.float64)) for name in losses}
    num_tokens = 0
    for rollout in rollouts:
        (batch,) = make_micro_batches([rollout], max_tokens=max_tokens, pad_id=student.tokenizer.pad_id, device=device)
        num_tokens += batch.num_tokens
        gradients = _gradients_of(student, model, batch, losses, teacher, request, weights, places)
        for name, gradient in gradients.items():
            sums[name].add(gradient, gradients.get(FULL))
    described = [each.describe(name, losses[name][1], num_tokens, sums.get(FULL)) for name, each in sums.items()]
    return Gradients(len(rollouts), sum(weight.numel() for weight in weights), num_kept, tuple(described))


def _gradients_of(
    student: Student,
    model: nn.Module,
    batch: MicroBatch,
    losses: Mapping[str, tuple[Objective, int | None]],
    teacher: Teacher,
    request: ScoreRequest,
    weights: Sequence[nn.Parameter],
    places: Sequence[Tensor],
) -> dict[str, Tensor]:
    """The gradient of each loss, float64 on the CPU, summed over the tokens of one micro-batch."""
    (scores,) = teacher.score_all([batch], request)
    hidden = student.hidden_states(model, batch)
    found = {}
    for name, (objective, _) in losses.items():
        total = compare_in_chunks(hidden, student.head(model), objective, scores, batch.tokens).losses.sum()
        gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        kept = [gradient.flatten()[place] for gradient, place in zip(gradients, places, strict=True)]
        found[name] = torch.cat([part.double().cpu() for part in kept])
    return found


def _drawn_places(sizes: Sequence[int], most: int, seed: int) -> list[Tensor]:
    """Indices into tensors of these sizes: all, or `most` drawn evenly from all (the same one twice at times)."""
    total = sum(sizes)
    if total <= most:
        return [torch.arange(size) for size in sizes]
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights of gradients") % 2**63)
    drawn = torch.randint(total, (most,), generator=generator).sort().values
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return [
        drawn[(drawn >= a) & (drawn < b)] - a for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
