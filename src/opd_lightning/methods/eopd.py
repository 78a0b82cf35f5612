"""EOPD: where the teacher is unsure, cover what it likes as well (arXiv 2603.07079)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import Clipped, ForwardKL, Importance, SampledTokenObjective, StudentScores, entropy
from opd_lightning.objectives.arguments import check_one_of
from opd_lightning.objectives.normalization import normalize

EntropyFrom = Literal["vocabulary", "top_k"]


class EntropyAware(SampledTokenObjective):
    """The policy gradient of the sampled token, plus a forward KL at states where the teacher's entropy is high.

    What is added is KL(q' || p) over the teacher's k likeliest tokens, with q' renormalised there and p as it is, so it
    pulls the student's mass into that set even where p = q. The gate reads the teacher only.

    Args:
        k: Tokens of the teacher that are covered.
        threshold: Teacher entropy in nats from which on the term is added.
        weight: Factor of the term.
        entropy_from: Whether the entropy is that of the whole "vocabulary", or a lower bound of it from the "top_k"
            (less opens then), for teachers that tell no more.
        importance: Correction for tokens drawn with older weights or by another engine; null for none.
        settings: Of `SampledTokenObjective`.

    Raises:
        ValueError: A number is outside its range.

    Source: arXiv 2603.07079, Eq. 10, as quoted by others: its code was not found.
    """

    def __init__(
        self,
        k: int = 16,
        threshold: float = 0.8,
        weight: float = 1.0,
        entropy_from: EntropyFrom = "vocabulary",
        importance: Importance | None = Clipped(),  # noqa: B008
        **settings: Any,
    ) -> None:
        super().__init__(importance=importance, **settings)
        check_at_least(1, "objective", k=k)
        check_one_of("objective.entropy_from", entropy_from, get_args(EntropyFrom))
        for name, value in {"threshold": threshold, "weight": weight}.items():
            if not value >= 0:
                raise ValueError(f"objective.{name}: expected a number of at least 0, got {value}.")
        self.k = k
        self.threshold = threshold
        self.weight = weight
        self.entropy_from: EntropyFrom = entropy_from

    @override
    def request(self) -> ScoreRequest:
        needed = super().request()
        is_whole = needed.full_vocabulary or self.entropy_from == "vocabulary"
        return replace(needed, top_k=max(needed.top_k, self.k), full_vocabulary=is_whole)

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        losses = super().losses_from(student, teacher, tokens)
        with torch.no_grad():
            ids, log_q = teacher.topk(min(self.k, student.tempered().shape[-1]))
            is_unsure = entropy(teacher.full() if self.entropy_from == "vocabulary" else log_q) >= self.threshold
            log_q = normalize(log_q, None, "renormalize")
        covered = ForwardKL().value(student.at(ids), log_q.to(losses))
        return losses + self.weight * is_unsure * covered
