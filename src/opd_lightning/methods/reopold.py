"""REOPOLD: rewards with a floor, and a mask that changes on the way (arXiv 2603.11137)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, MicroBatch, ResponseTokens, TeacherScores, TokenWeighting
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives.arguments import check_one_of

Reading = Literal["infimum", "odds"]


@dataclass(frozen=True)
class Floor:
    """The least reward, from the student's share in a mixture with the teacher.

    Args:
        mixture: lambda in (0, 1); the paper's value is not known for certain (about 0.2). Towards 0 the floor is gone.
        reading: "infimum" is ln(lambda) / (1 - lambda), the infimum of the mixture reward with slope 1 at 0, and
            negative for every lambda; "odds" is ln(lambda / (1 - lambda)), which others quote and which is positive
            above 1/2.
        value: The floor itself, in nats, in place of the two.

    Raises:
        ValueError: A setting is outside its range.
    """

    mixture: float = 0.2
    reading: Reading = "infimum"
    value: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mixture < 1:
            raise ValueError(f"floor.mixture: expected a number between 0 and 1, got {self.mixture}.")
        check_one_of("floor.reading", self.reading, get_args(Reading))
        if not self.nats < 0:
            raise ValueError(
                f"floor: {self.nats:g} nats would raise the reward of tokens on which both models agree. Set"
                " floor.mixture below 0.5, floor.reading: infimum, or floor.value below 0."
            )

    @property
    def nats(self) -> float:
        """The floor."""
        if self.value is not None:
            return self.value
        scale = 1 / (1 - self.mixture) if self.reading == "infimum" else 1.0
        rest = 0.0 if self.reading == "infimum" else math.log1p(-self.mixture)
        return math.log(self.mixture) * scale - rest


class RewardFloor(Advantage):
    """max(log q(y) - log p(y), floor): a token that the teacher finds absurd is not punished without end.

    Args:
        floor: The least reward.

    Source: arXiv 2603.11137, from notes and code of others; the authors' own was announced and not found.
    """

    def __init__(self, floor: Floor = Floor()) -> None:
        self.floor = floor

    @override
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        return rewards.clamp(min=self.floor.nats)


class AboveFloorThenUncertain(TokenWeighting):
    """Keep the tokens whose reward is above the floor; from a step on, those where the student is least certain.

    Args:
        switch_step: First step of the second phase; the paper's is not known for certain (about half of the run).
        share: Of each response, the share of tokens with the largest student entropy that the second phase keeps, one
            at least; not known for certain either (about 0.5). That the share is one of each response is ours: so it
            does not depend on how a step is cut.
        floor: As in `RewardFloor`.

    Raises:
        ValueError: A number is outside its range.

    Source: arXiv 2603.11137, from notes and code of others.
    """

    reads = ("sampled_log_ratio", "student_entropy")
    normalizer = "kept_tokens"

    def __init__(self, switch_step: int, share: float = 0.5, floor: Floor = Floor()) -> None:
        check_at_least(0, "token_weighting", switch_step=switch_step)
        if not 0 < share <= 1:
            raise ValueError(f"token_weighting.share: expected a number in (0, 1], got {share}.")
        self.switch_step = switch_step
        self.share = share
        self.floor = floor

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        above = -facts["sampled_log_ratio"] > self.floor.nats
        uncertain = torch.cat([self._uncertain(each) for each in micro_batch.by_rollout(facts["student_entropy"])])
        has_switched = micro_batch.tokens.extras["step"] >= self.switch_step
        return torch.where(has_switched, uncertain, above).float()

    def _uncertain(self, entropies: Tensor) -> Tensor:
        kept = torch.zeros_like(entropies, dtype=torch.bool)
        if len(entropies):
            kept[entropies.topk(max(1, int(self.share * len(entropies)))).indices] = True
        return kept
