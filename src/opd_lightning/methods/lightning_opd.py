"""Lightning OPD: the student's first answers and the teacher's scores of them, written once (arXiv 2604.13010)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import Importance
from opd_lightning.rollouts.answer_scores import ScoredAnswer
from opd_lightning.teachers import StoredTeacher


@dataclass(frozen=True)
class Uncorrected(Importance):
    """-A log p whoever drew the token: the bias of answers that older weights wrote is accepted, knowingly.

    Where the weights are still those that wrote, this is the on-policy gradient. Source: arXiv 2604.13010.
    """

    reads_rollout_log_probs = False

    @override
    def losses(self, advantages: Tensor, log_probs: Tensor, log_ratio: Tensor) -> Tensor:
        return -advantages * log_probs


class DebiasedTeacher(StoredTeacher):
    """Stored scores less what is predictable of log q - log p_ref from the token alone, or from place and surprisal.

    The prediction of a token is half the mean of its id, and half the mean of its cell of position and surprisal
    -log p_ref; both are taken over the answers of the other folds, so no answer predicts itself. Problems are dealt to
    folds by a hash of their uid. Offers the sampled token only.

    Folds are the paper's; the cells are ours, as nothing is published of them: positions 0, 1-2, 3-6, 7-14 and so on,
    and the bounds below.

    Args:
        path: File of `opd-lightning rollout --role student --score true`, with log-probabilities.
        num_folds: Parts that the problems are dealt to.
        surprisal_bounds: Where the cells of surprisal end, in nats, rising.
        min_count: A mean over fewer tokens predicts 0.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2607.28449 (second-hand: the authors' code was not found).
    """

    def __init__(
        self,
        path: str,
        num_folds: int = 5,
        surprisal_bounds: Sequence[float] = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0),
        min_count: int = 5,
    ) -> None:
        super().__init__(path)
        check_at_least(2, "teacher", num_folds=num_folds)
        check_at_least(1, "teacher", min_count=min_count)
        if list(surprisal_bounds) != sorted(surprisal_bounds) or not all(map(math.isfinite, surprisal_bounds)):
            raise ValueError(f"teacher.surprisal_bounds: expected rising numbers, got {list(surprisal_bounds)}.")
        self.num_folds = num_folds
        self.surprisal_bounds = list(surprisal_bounds)
        self.min_count = min_count

    @property
    @override
    def offer(self) -> ScoreRequest:
        return ScoreRequest()

    @override
    def read(self) -> dict[str, list[ScoredAnswer]]:
        answers = super().read()
        bias = iter(self.predict([(uid, each) for uid, found in answers.items() for each in found]))
        return {
            uid: [replace(each, sampled=each.sampled - next(bias)) for each in found] for uid, found in answers.items()
        }

    def predict(self, answers: Sequence[tuple[str, ScoredAnswer]]) -> list[Tensor]:
        """The predictable part of log q - log p_ref, float32 [N] for each answer.

        Args:
            answers: Each with the uid of its problem.

        Raises:
            ValueError: The log-probabilities of an answer are not known.
        """
        for uid, answer in answers:
            if answer.log_probs is None or not answer.sampled.isfinite().all():
                raise ValueError(
                    f"StoredTeacher.path: {self.path!r}, {answer.place} (problem {uid!r}): DebiasedTeacher needs finite"
                    " scores and the log-probabilities that the tokens were drawn with. Write it with an engine that"
                    " knows them, or take StoredTeacher."
                )
        sizes = [len(answer.sampled) for _, answer in answers]
        folds = torch.cat([torch.full((n,), self.fold(uid)) for (uid, _), n in zip(answers, sizes, strict=True)])
        drawn = torch.cat([answer.log_probs for _, answer in answers if answer.log_probs is not None]).double()
        residuals = torch.cat([answer.sampled for _, answer in answers]).double() - drawn
        tokens = torch.cat([answer.response_ids[answer.places] for _, answer in answers]).long()
        positions = torch.cat([answer.places for _, answer in answers])
        bounds = torch.tensor(self.surprisal_bounds, dtype=torch.float64)
        surprisal = torch.bucketize(-drawn, bounds)
        cells = (positions + 1).log2().floor().long() * (len(bounds) + 1) + surprisal
        bias = (self._means(residuals, tokens, folds) + self._means(residuals, cells, folds)) / 2
        return list(torch.split(bias.float(), sizes))

    def fold(self, uid: str) -> int:
        """Which part a problem is dealt to, the same in every process."""
        return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest()) % self.num_folds

    def _means(self, values: Tensor, keys: Tensor, folds: Tensor) -> Tensor:
        """For each value the mean of those with its key in the other folds."""
        size = self.num_folds * (int(keys.max()) + 1 if len(keys) else 0)
        places = keys * self.num_folds + folds
        sums = values.new_zeros(size).index_add_(0, places, values).view(-1, self.num_folds)
        counts = values.new_zeros(size).index_add_(0, places, torch.ones_like(values)).view(-1, self.num_folds)
        others, num_others = sums.sum(-1, keepdim=True) - sums, counts.sum(-1, keepdim=True) - counts
        means = torch.where(num_others >= self.min_count, others / num_others.clamp(min=1), 0.0)
        return means.flatten()[places]
