"""TIP: train on the tokens at which the student is uncertain or wrong (arXiv 2604.14084)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import MicroBatch, Rollout, TokenWeighting, TrainedRollout
from opd_lightning.randomness import derive_seed, hashed_uniforms

Choice = Literal["best", "drawn"]


class TIP(TokenWeighting):
    """Keeps a share of each response's tokens and trains on their mean loss; the others reach no head.

    All of a step is looked at first, without gradient: entropy H(p) and divergence KL(p || q) of every token. "best"
    clips both at their largest 2 % in the step (all processes), scales them to 0..1, and keeps the tokens with the
    largest s = h + d - h d. "drawn" draws as many without replacement, with probabilities proportional to
    H^entropy_power KL^divergence_power; the seed of a rollout decides. A response keeps one token at least.

    Args:
        share: Of each response's tokens, rounded down; 1 is plain distillation.
        choice: "best" is the paper's rule. "drawn" is its baseline with the default powers, and in form the sampler of
            the authors' shared repository, which takes the Jensen-Shannon divergence instead.
        entropy_power: Only for "drawn".
        divergence_power: Only for "drawn".
        clip: Share of the step's tokens at the top that count as equal before scaling.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2604.14084. Without a teacher's whole vocabulary the run is refused.
    """

    reads = ("student_entropy", "reverse_kl")
    normalizer = "kept_tokens"
    looks_first = True

    def __init__(
        self,
        share: float = 0.5,
        choice: Choice = "best",
        entropy_power: float = 1.0,
        divergence_power: float = 0.0,
        clip: float = 0.02,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"token_weighting.share: expected a number above 0 and at most 1, got {share}.")
        if choice not in get_args(Choice):
            raise ValueError(f"token_weighting.choice: expected one of {', '.join(get_args(Choice))}, got {choice!r}.")
        if not 0 <= clip < 1:
            raise ValueError(f"token_weighting.clip: expected a share from 0 to below 1, got {clip}.")
        powers = {"entropy_power": entropy_power, "divergence_power": divergence_power}
        for name, power in powers.items():
            if not 0 <= power < math.inf:
                raise ValueError(f"token_weighting.{name}: expected a finite number of at least 0, got {power}.")
        self.share, self.choice, self.clip = share, choice, clip
        self.entropy_power, self.divergence_power = entropy_power, divergence_power

    @override
    def look(self, step: Sequence[TrainedRollout]) -> Sequence[Rollout]:
        if self.choice == "best":
            entropies = self._scaled([each.facts["student_entropy"] for each in step])
            divergences = self._scaled([each.facts["reverse_kl"] for each in step])
            scores = [h + d - h * d for h, d in zip(entropies, divergences, strict=True)]
        else:
            scores = [self._drawn(each) for each in step]
        return [self._keep(each.rollout, score) for each, score in zip(step, scores, strict=True)]

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        return torch.ones(micro_batch.num_tokens)

    def _scaled(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Clipped at the step's largest and scaled to 0..1; all 0 where all are equal."""
        shares = gather_objects(torch.cat([torch.zeros(0), *values]))
        everything = torch.cat(shares).double()
        rank = max(1, math.ceil((1 - self.clip) * len(everything)))
        lowest, highest = everything.min(), everything.kthvalue(rank).values
        width = (highest - lowest).clamp(min=torch.finfo(torch.float64).tiny)
        return [((value.double().clamp(max=highest) - lowest) / width) for value in values]

    def _drawn(self, trained: TrainedRollout) -> Tensor:
        """The largest of log-weights plus Gumbel noise are a draw without replacement."""
        entropy, divergence = (trained.facts[name].double().clamp(min=0) for name in self.reads)
        log_weights = self.entropy_power * entropy.log().clamp(min=-1e3)
        log_weights = log_weights + self.divergence_power * divergence.log().clamp(min=-1e3)
        seed = torch.tensor([derive_seed("TIP", trained.rollout.seed)])
        uniforms = hashed_uniforms(seed[:, None], trained.rollout.trained_positions)[0]
        return log_weights - (-uniforms.log()).log()

    def _keep(self, rollout: Rollout, scores: Tensor) -> Rollout:
        """The rollout with its best tokens as the only ones that are trained; of equal ones the earlier."""
        number = max(1, math.floor(self.share * len(scores) + 1e-9))
        chosen = scores.argsort(descending=True, stable=True)[:number]
        kept = torch.zeros(len(rollout.response_ids), dtype=torch.bool)
        kept[rollout.trained_positions[chosen]] = True
        return replace(rollout, student_wrote=kept)
