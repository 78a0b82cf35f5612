"""TrOPD: trust what the student sampled where the teacher agrees (arXiv 2606.01249)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Normalizer, TokenWeighting


class AgreementWeight(TokenWeighting):
    """Weigh each sampled token y by min(q(y) / p(y), 1): tokens that the teacher finds unlikely count less.

    1 where the teacher finds the token at least as likely as the student does, so a student that equals its teacher is
    trained as without it.

    Args:
        normalizer: What the weighted sum is divided by; the paper's is not known.

    Source: arXiv 2606.01249, known to us from a note only.
    """

    reads = ("sampled_log_ratio",)

    def __init__(self, normalizer: Normalizer = "all_tokens") -> None:
        self.normalizer = normalizer

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        return (-facts["sampled_log_ratio"]).clamp(max=0).exp()
