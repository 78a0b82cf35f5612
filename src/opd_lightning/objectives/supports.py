"""Candidate tokens of each position, and how both models are normalised on them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ScoreRequest, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives.arguments import check_one_of
from opd_lightning.objectives.normalization import Normalization
from opd_lightning.objectives.top_tokens import top_tokens

DEFAULT_K = 16


@dataclass(frozen=True)
class Candidates:
    """The tokens that are compared at each of n positions.

    Attributes:
        ids: int64 [n, K]; None stands for the whole vocabulary in order.
        teacher_log_probs: [n, K] teacher log-probabilities of them, in nats; [n, V] for the whole vocabulary.
        mask: bool [n, K], True where a slot counts; None when all do.
    """

    ids: Tensor | None
    teacher_log_probs: Tensor
    mask: Tensor | None = None


class Support(ABC):
    """Which tokens are compared at each position, and how both models are normalised on them.

    Attributes:
        normalization: On the support: "renormalize" both models, append a "tail" bucket with the remaining mass of
            each, or "none".
        is_whole: Whether it is the whole vocabulary, which needs no normalisation.
    """

    normalization: Normalization = "none"
    is_whole: bool = False

    @property
    def is_single(self) -> bool:
        """Whether at most one token is compared."""
        return False

    @abstractmethod
    def request(self, temperature: float) -> ScoreRequest:
        """What the teacher must answer, at its temperature."""

    @abstractmethod
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        """Choose the candidate tokens of n positions; no gradient flows through the choice.

        Args:
            student_logits: [n, V], tempered or not: only the order matters.
            teacher: Scores of the same n positions.
            response_ids: int64 [n], the sampled tokens.
        """


@dataclass(frozen=True)
class FullVocabulary(Support):
    """Every token: the exact divergence."""

    is_whole = True

    @override
    def request(self, temperature: float) -> ScoreRequest:
        return ScoreRequest(full_vocabulary=True, temperature=temperature)

    @override
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        return Candidates(None, teacher.full())


@dataclass(frozen=True)
class SampledToken(Support):
    """The sampled token against all others together (a tail bucket): the divergence of two coins.

    For the policy gradient on the sampled token see `SampledTokenObjective`.
    """

    normalization = "tail"

    @property
    @override
    def is_single(self) -> bool:
        return True

    @override
    def request(self, temperature: float) -> ScoreRequest:
        return ScoreRequest(temperature=temperature)

    @override
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        return Candidates(response_ids[:, None], teacher.sampled()[:, None])


@dataclass(frozen=True)
class _TopK(Support):
    """Supports made of the k likeliest tokens S_p of the student and S_q of the teacher.

    Renormalised, they say nothing about the mass outside them: watch the metric `student_top_mass`, or use "tail".

    Args:
        k: Size of the top-k lists; clipped to the vocabulary.
        normalization: "renormalize", "tail", or "none" (score functions only).

    Raises:
        ValueError: k is below 1, the normalisation is none of these, or a single token is renormalised, which has
            probability 1 under both models and no gradient.
    """

    k: int = DEFAULT_K
    normalization: Normalization = "renormalize"

    def __post_init__(self) -> None:
        check_at_least(1, "support", k=self.k)
        check_one_of("support.normalization", self.normalization, get_args(Normalization))
        if self.is_single and self.normalization == "renormalize":
            raise ValueError(
                "support.k: a single renormalised token has probability 1 under both models, so"
                f" {type(self).__name__} with k=1 has no gradient. Use k of at least 2, or normalization: tail."
            )

    @property
    @override
    def is_single(self) -> bool:
        return self.k == 1

    def _student_ids(self, student_logits: Tensor) -> Tensor:
        return top_tokens(student_logits, min(self.k, student_logits.shape[-1]))[1]


@dataclass(frozen=True)
class StudentTopK(_TopK):
    """S_p, the student's likeliest tokens (arXiv 2604.13016)."""

    @override
    def request(self, temperature: float) -> ScoreRequest:
        return ScoreRequest(arbitrary_ids=True, temperature=temperature)

    @override
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        student_ids = self._student_ids(student_logits)
        return Candidates(student_ids, teacher.at(student_ids))


@dataclass(frozen=True)
class TeacherTopK(_TopK):
    """S_q, the teacher's likeliest tokens."""

    @override
    def request(self, temperature: float) -> ScoreRequest:
        return ScoreRequest(top_k=self.k, temperature=temperature)

    @override
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        return Candidates(*teacher.topk(min(self.k, student_logits.shape[-1])))


@dataclass(frozen=True)
class Intersection(_TopK):
    """Tokens in both S_p and S_q, in the student's k slots with the others masked; there may be none."""

    @override
    def request(self, temperature: float) -> ScoreRequest:
        return ScoreRequest(top_k=self.k, temperature=temperature)

    @override
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        student_ids = self._student_ids(student_logits)
        teacher_ids, teacher_top = teacher.topk(student_ids.shape[-1])
        return Candidates(student_ids, *look_up(student_ids, teacher_ids, teacher_top))


@dataclass(frozen=True)
class Union(_TopK):
    """Tokens in S_p or S_q, in 2k slots: each token in one unmasked slot at most."""

    @property
    @override
    def is_single(self) -> bool:
        return False

    @override
    def request(self, temperature: float) -> ScoreRequest:
        return ScoreRequest(top_k=self.k, arbitrary_ids=True, temperature=temperature)

    @override
    def select(self, student_logits: Tensor, teacher: TeacherScores, response_ids: Tensor) -> Candidates:
        student_ids = self._student_ids(student_logits)
        teacher_ids, teacher_top = teacher.topk(student_ids.shape[-1])
        same = same_tokens(student_ids, teacher_ids)
        return Candidates(
            ids=torch.cat([student_ids, teacher_ids], dim=-1),
            teacher_log_probs=torch.cat([teacher.at(student_ids), teacher_top], dim=-1),
            mask=torch.cat([self._student_mask(same), ~same.any(1)], dim=-1),
        )

    def _student_mask(self, same: Tensor) -> Tensor:
        return torch.ones_like(same[:, :, 0])


@dataclass(frozen=True)
class SymmetricDifference(Union):
    """Tokens in exactly one of S_p and S_q; there may be none."""

    @override
    def _student_mask(self, same: Tensor) -> Tensor:
        return ~same.any(2)


def same_tokens(first_ids: Tensor, second_ids: Tensor) -> Tensor:
    """Which entries of two id lists [n, K] and [n, L] are the same token: bool [n, K, L]."""
    return first_ids[:, :, None] == second_ids[:, None, :]


def look_up(ids: Tensor, listed_ids: Tensor, listed_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Find tokens in another list: their log-probabilities there [n, K], -inf where it lacks them, and the mask.

    Args:
        ids: int64 [n, K].
        listed_ids: int64 [n, L], each token once.
        listed_log_probs: [n, L].
    """
    same = same_tokens(ids, listed_ids)
    log_probs = listed_log_probs[:, None, :].expand_as(same).masked_fill(~same, -math.inf).amax(-1)
    return log_probs, same.any(2)
