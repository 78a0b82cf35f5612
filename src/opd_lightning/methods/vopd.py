"""vOPD: the reward of a sampled token less its expectation (arXiv 2605.07865)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives import full_log_probs


class KLBaseline(Advantage):
    """Subtract from every reward log q(y) - log p(y) its mean under the student, which is -KL(p || q) at that state.

    The mean does not depend on the token that was sampled, so the expected gradient stays that of the reverse KL,
    whatever `k` is. The variance falls over many states, not at each. The rewards must not be clipped or changed in
    another non-linear way before: the mean of what is left would be another.

    Args:
        k: Estimate the mean on the student's k likeliest tokens, both models renormalised there (the paper takes 100);
            null takes the whole vocabulary.

    Raises:
        ValueError: k is below 1.

    Source: arXiv 2605.07865, Eqs. 9 to 15.
    """

    def __init__(self, k: int | None = None) -> None:
        if k is not None and k < 1:
            raise ValueError(f"advantage.k: expected at least 1, or null for the whole vocabulary, got {k}.")
        self.k = k

    @override
    def request(self, needed: ScoreRequest) -> ScoreRequest:
        return replace(needed, full_vocabulary=True) if self.k is None else replace(needed, arbitrary_ids=True)

    @override
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        log_p = full_log_probs(student_logits)
        if self.k is None:
            log_q = teacher.full()
        else:
            log_p, ids = log_p.topk(min(self.k, log_p.shape[-1]))
            log_p, log_q = log_p.log_softmax(-1), teacher.at(ids).log_softmax(-1)
        return rewards + (log_p.exp() * (log_p - log_q)).sum(-1)
