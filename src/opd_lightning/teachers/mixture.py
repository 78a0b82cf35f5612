"""`MixtureTeacher`: several teachers score every token, and their distributions are mixed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Problem, ScoreRequest, Teacher, TeacherScores
from opd_lightning.interfaces.columns import as_number, look_up
from opd_lightning.teachers.several import SeveralTeachers

Mean = Literal["arithmetic", "geometric"]


class MixtureTeacher(SeveralTeachers):
    """The mean of several teachers' distributions, weighted.

    The arithmetic mean sum_k w_k q_k is what one of them would say, drawn by its weight; the geometric mean, product_k
    q_k^w_k over its sum, is the linear interpolation of their logits. The forward KL from the first and the reverse KL
    to the second have the gradient of the weighted mean of the teachers' own (they differ by a constant).
    With one teacher it is that teacher, to the last bit.

    Args:
        teachers: By name.
        weights: Share of each, positive, for all problems; they are divided by their sum. None: all alike.
        confidence: Column of the problem with a confidence from 0 to 100 for each teacher, by its name: then weights
            are softmax(confidence / (100 tau)), and all alike for problems where one is missing (arXiv 2605.01347).
        tau: Temperature of that softmax.
        mean: "arithmetic" or "geometric", which needs the whole vocabulary of each.
        paged: Whether the teachers take turns on the device (`SeveralTeachers`).

    Raises:
        ValueError: Weights are not one positive number per teacher, or settings contradict each other.
    """

    def __init__(
        self,
        teachers: dict[str, Teacher],
        weights: Mapping[str, float] | None = None,
        confidence: str | None = None,
        tau: float = 1.0,
        mean: Mean = "arithmetic",
        paged: bool = False,
    ) -> None:
        super().__init__(teachers, paged)
        if weights is not None and confidence is not None:
            raise ValueError("model.teacher.weights: the column in confidence gives them; leave out one of the two.")
        if weights is not None and (
            weights.keys() != teachers.keys() or not all(0 < weight < math.inf for weight in weights.values())
        ):
            raise ValueError(
                f"model.teacher.weights: expected a positive number for each of {', '.join(teachers)}, got"
                f" {dict(weights)}."
            )
        if not tau > 0:
            raise ValueError(f"model.teacher.tau: expected a positive number, got {tau}.")
        if mean not in get_args(Mean):
            raise ValueError(f"model.teacher.mean: expected one of {', '.join(get_args(Mean))}, got {mean!r}.")
        self.weights = None if weights is None else dict(weights)
        self.confidence = confidence
        self.tau = tau
        self.mean = mean

    @property
    @override
    def offer(self) -> ScoreRequest:
        """Lists of likeliest tokens and geometric means need the whole vocabulary of each."""
        offer = super().offer
        if len(self.teachers) == 1 or offer.full_vocabulary:
            return offer
        return replace(offer, top_k=0)

    @override
    def check(self, request: ScoreRequest) -> None:
        super().check(request)
        if self.mean == "geometric" and not self.offer.full_vocabulary:
            raise ValueError(
                "model.teacher.mean: a geometric mean is normalised over the whole vocabulary, which not all of the"
                " teachers give. Set mean: arithmetic, or take teachers in this process (HFTeacher)."
            )

    def shares(self, problem: Problem) -> list[float]:
        """Weights of the teachers for a problem, in their order; they sum to 1."""
        given = [1.0] * len(self.teachers) if self.weights is None else [self.weights[name] for name in self.teachers]
        if self.confidence is not None:
            found = [as_number(look_up(problem.columns, f"{self.confidence}.{name}")) for name in self.teachers]
            known = [number for number in found if number is not None]
            if len(known) == len(found):
                given = [math.exp((number - max(known)) / (100 * self.tau)) for number in known]
        return [weight / sum(given) for weight in given]

    @override
    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        asked = request
        if request.top_k or self.mean == "geometric":
            asked = replace(request, top_k=0, full_vocabulary=True) if len(self.teachers) > 1 else request
        return self._mixed(batches, [iter(teacher.score_all(batches, asked)) for teacher in self.teachers.values()])

    def _mixed(
        self, batches: Sequence[MicroBatch], streams: Sequence[Iterator[TeacherScores]]
    ) -> Iterator[TeacherScores]:
        for batch in batches:
            scores = [next(stream) for stream in streams]
            yield scores[0] if len(scores) == 1 else MixedScores(scores, self._weights(batch), self.mean)

    def _weights(self, batch: MicroBatch) -> Tensor:
        shares = torch.tensor([self.shares(rollout.problem) for rollout in batch.rollouts], dtype=torch.float32)
        return shares.to(batch.rows.device)[batch.rows]


class MixedScores(TeacherScores):
    """The weighted mean of the distributions in several teachers' scores of the same N tokens.

    Args:
        scores: Of each teacher.
        weights: [N, teachers]; each row sums to 1.
        mean: Which mean.
    """

    def __init__(self, scores: Sequence[TeacherScores], weights: Tensor, mean: Mean) -> None:
        self.response_ids = scores[0].response_ids
        self.knows_full = all(each.knows_full for each in scores)
        self._scores, self._weights, self._mean = scores, weights, mean
        self._full: Tensor | None = None

    @override
    def slice(self, start: int, stop: int) -> MixedScores:
        parts = [scores.slice(start, stop) for scores in self._scores]
        mixed = MixedScores(parts, self._weights[start:stop], self._mean)
        mixed._full = None if self._full is None else self._full[start:stop]
        return mixed

    @override
    def columns(self) -> dict[str, Tensor] | None:
        """Those of each teacher, under its number, and the weights."""
        found = {"weights": self._weights}
        for number, scores in enumerate(self._scores):
            columns = scores.columns()
            if columns is None:
                return None
            found |= {f"{number}.{name}": column for name, column in columns.items()}
        return found

    @override
    def from_columns(self, columns: Mapping[str, Tensor]) -> MixedScores:
        parts = [
            scores.from_columns(
                {name.removeprefix(f"{number}."): c for name, c in columns.items() if name.startswith(f"{number}.")}
            )
            for number, scores in enumerate(self._scores)
        ]
        return MixedScores(parts, columns["weights"], self._mean)

    @override
    def members(self) -> Sequence[tuple[Tensor, TeacherScores]]:
        return list(zip(self._weights.unbind(-1), self._scores, strict=True))

    @override
    def full(self) -> Tensor:
        if self._full is None:
            each = [scores.full() for scores in self._scores]
            self._full = self._mix(each) if self._mean == "arithmetic" else self._interpolate(each)
        return self._full

    @override
    def sampled(self) -> Tensor:
        if self._mean == "geometric":
            return super().sampled()
        return self._mix([scores.sampled()[:, None] for scores in self._scores]).squeeze(-1)

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        if self._mean == "geometric":
            return super().at(token_ids)
        return self._mix([scores.at(token_ids) for scores in self._scores])

    def _mix(self, log_probs: Sequence[Tensor]) -> Tensor:
        weights = self._weights.log()[:, None].unbind(-1)
        mixed = log_probs[0] + weights[0]
        for more, weight in zip(log_probs[1:], weights[1:], strict=True):
            mixed = torch.logaddexp(mixed, more + weight)
        return mixed

    def _interpolate(self, log_probs: Sequence[Tensor]) -> Tensor:
        weights = self._weights[:, None].unbind(-1)
        mixed = log_probs[0] * weights[0]
        for more, weight in zip(log_probs[1:], weights[1:], strict=True):
            mixed = mixed + more * weight
        return mixed.log_softmax(-1)
