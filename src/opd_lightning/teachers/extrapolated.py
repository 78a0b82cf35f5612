"""`ExtrapolatedTeacher`: as far beyond the teacher as it is beyond a reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Rollout, ScoreRequest, Student, Teacher, TeacherScores
from opd_lightning.objectives.logprobs import close_slots
from opd_lightning.objectives.normalization import log1mexp
from opd_lightning.teachers.several import SeveralTeachers


class ExtrapolatedTeacher(SeveralTeachers):
    """A teacher q and a reference r as one: log q + (scale - 1) (log q - log r) of every token.

    With scale 1 it is the teacher, with 0 the reference; above 1 it goes on in the direction from the reference to the
    teacher. As the reference of a student with an adapter, `BaseModelTeacher` takes no memory.

    Args:
        teacher: Who is extrapolated.
        reference: Where the direction starts: the student as it was, or the teacher before its own training.
        scale: How far: 1.25 in the paper; 1.5 was unstable there.
        normalized: Scores are log-probabilities of q^scale r^(1 - scale) / Z, so whole distributions can be compared;
            takes the whole vocabulary of both. Without it they are sums of the sampled token's, log Z more: what the
            paper's advantage is made of, for `SampledTokenObjective` only. Z depends on the state alone, so the
            expected gradient is the same.
        tail_ratio: Experimental: C above 1. Where the teacher's likeliest token has mass b under the reference, cap the
            scale (to no less than 1) so that the other tokens keep a mass of (1 - b) / C; null for no cap. Needs
            `normalized`.

    Raises:
        ValueError: A setting is outside its range, or they contradict each other.

    Source: arXiv 2602.12125; the cap is our conjecture after arXiv 2605.08737, whose formula was not found.
    """

    place = ""

    def __init__(
        self,
        teacher: Teacher,
        reference: Teacher,
        scale: float = 1.25,
        normalized: bool = False,
        tail_ratio: float | None = None,
    ) -> None:
        if not 0 <= scale < math.inf:
            raise ValueError(f"teacher.scale: expected a finite number of at least 0, got {scale}.")
        if tail_ratio is not None and not 1 < tail_ratio < math.inf:
            raise ValueError(f"teacher.tail_ratio: expected a finite number above 1, or null, got {tail_ratio}.")
        if tail_ratio is not None and not normalized:
            raise ValueError(
                "teacher.tail_ratio: the cap needs whole distributions. Set teacher.normalized: true, or leave it out."
            )
        super().__init__({"teacher": teacher, "reference": reference})
        self.scale = scale
        self.normalized = normalized
        self.tail_ratio = tail_ratio

    @property
    @override
    def offer(self) -> ScoreRequest:
        if self.normalized:
            return ScoreRequest(top_k=sys.maxsize, arbitrary_ids=True, full_vocabulary=True)
        return ScoreRequest()

    @override
    def check(self, request: ScoreRequest) -> None:
        Teacher.check(self, request)  # of the two something else is asked

    @override
    def preflight(self, student: Student) -> None:
        """Check both against the student, and that they give what is needed of them."""
        for name, each in self.teachers.items():
            if self.normalized and not each.offer.full_vocabulary:
                raise ValueError(
                    f"model.teacher.{name}: {type(each).__name__} gives {each.offer}, and a normalised extrapolation"
                    " needs the full vocabulary. Set teacher.normalized: false, with SampledTokenObjective."
                )
        super().preflight(student)

    @override
    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        asked = self._asked(request)
        streams = [each.score_all(batches, asked) for each in self.teachers.values()]
        return self._extrapolated(zip(*streams, strict=True))

    def _extrapolated(self, pairs: Iterator[tuple[TeacherScores, ...]]) -> Iterator[TeacherScores]:
        for teacher, reference in pairs:
            if self.normalized:
                yield _Extrapolated(teacher, reference, self.scale, self.tail_ratio)
            else:
                sampled = extrapolate(teacher.sampled(), reference.sampled(), self.scale)
                yield _Sampled(sampled, teacher.response_ids)

    @override
    def prefetch(self, rollout: Rollout, request: ScoreRequest, step: int) -> None:
        super().prefetch(rollout, self._asked(request), step)

    def _asked(self, request: ScoreRequest) -> ScoreRequest:
        return ScoreRequest(full_vocabulary=self.normalized, temperature=request.temperature)


class _Sampled(TeacherScores):
    """Sums of the sampled tokens, and nothing else."""

    knows_full = False

    def __init__(self, sampled: Tensor, response_ids: Tensor) -> None:
        self._sampled = sampled
        self.response_ids = response_ids

    @override
    def slice(self, start: int, stop: int) -> _Sampled:
        return _Sampled(self._sampled[start:stop], self.response_ids[start:stop])

    @override
    def sampled(self) -> Tensor:
        return self._sampled

    @override
    def full(self) -> Tensor:
        raise AssertionError("not offered")


class _Extrapolated(TeacherScores):
    """The extrapolated distribution."""

    def __init__(
        self, teacher: TeacherScores, reference: TeacherScores, scale: float, tail_ratio: float | None
    ) -> None:
        self._teacher, self._reference = teacher, reference
        self._scale, self._tail_ratio = scale, tail_ratio
        self.response_ids = teacher.response_ids

    @override
    def slice(self, start: int, stop: int) -> _Extrapolated:
        parts = self._teacher.slice(start, stop), self._reference.slice(start, stop)
        return _Extrapolated(*parts, self._scale, self._tail_ratio)

    @override
    def full(self) -> Tensor:
        log_q, log_r = self._teacher.full(), self._reference.full()
        scale: Tensor | float = self._scale
        if self._tail_ratio is not None:
            log_p, modal = close_slots(log_q).max(-1, keepdim=True)
            cap = largest_scale(log_p, close_slots(log_r).gather(-1, modal), self._tail_ratio)
            scale = cap.clamp(min=1.0).clamp(max=self._scale).to(log_q)
        return extrapolate(log_q, log_r, scale).log_softmax(-1)


def extrapolate(log_q: Tensor, log_r: Tensor, scale: Tensor | float) -> Tensor:
    """Log q + (scale - 1) (log q - log r), bit for bit log q at scale 1."""
    log_q, log_r = close_slots(log_q), close_slots(log_r)
    return log_q + (scale - 1) * (log_q - log_r)


def largest_scale(log_p: Tensor, log_b: Tensor, tail_ratio: float) -> Tensor:
    """The scale at which all other tokens together keep the mass (1 - b) / C, in float64; infinite where p <= b.

    At a scale of lambda a token with mass p under the teacher and b under the reference has, against all others as one,
    the mass pi with logit(pi) = lambda logit(p) + (1 - lambda) logit(b).

    Args:
        log_p: Logarithm of p, any shape.
        log_b: Logarithm of b, of the same shape.
        tail_ratio: C.
    """
    log_p, log_b = log_p.double(), log_b.double()
    log_tail = log1mexp(log_b)  # 1 - b
    reach = torch.log((tail_ratio - log_tail.exp()) / log_b.exp().clamp(min=torch.finfo(torch.float64).tiny))
    distance = (log_p - log1mexp(log_p)) - (log_b - log_tail)
    return torch.where(distance > 0, reach / distance.clamp(min=1e-300), math.inf)
