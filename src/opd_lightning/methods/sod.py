"""SOD: a turn that is further from the teacher than the first counts less (arXiv 2605.07725)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Normalizer, Rollout, TokenWeighting, TrainedRollout
from opd_lightning.objectives.group_reward import STEP_WEIGHT

EPSILON = 1e-6


class StepWeights(TokenWeighting):
    """All tokens of turn k count w_k = min((d_1 + e) / (d_k + e), 1 + slack), and those of the first 1.

    A turn is a run of tokens that the student wrote without interruption; d_k is the mean size of the log-ratio of
    teacher and student over its tokens, e = 1e-6. The published product over turns telescopes to this: w_k knows of d_1
    and d_k only. Where a tool's error throws the student off, the teacher's words are trusted less.

    With `rewards` only the distillation part of the advantage is weighted, and the reward of `GroupReward` beside it is
    not: a step is then looked at first, which costs a second pass of student and teacher.

    Args:
        slack: How far above 1 a weight may go; the paper's text has 0.2, its code 0.5 where nothing is said.
        rewards: Whether the objective's advantage is `GroupReward`, which then takes the weights in.
        normalizer: What the weighted sum is divided by.

    Raises:
        ValueError: The slack is negative.

    Source: arXiv 2605.07725.
    """

    reads = ("sampled_log_ratio",)

    def __init__(self, slack: float = 0.2, rewards: bool = False, normalizer: Normalizer = "all_tokens") -> None:
        if not slack >= 0:
            raise ValueError(f"token_weighting.slack: expected a number of at least 0, got {slack}.")
        self.slack, self.rewards, self.normalizer = slack, rewards, normalizer
        self.looks_first = rewards

    @override
    def look(self, step: Sequence[TrainedRollout]) -> Sequence[Rollout]:
        return [self._noted(each) for each in step]

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        if self.rewards:
            return torch.ones(micro_batch.num_tokens)
        log_ratios = micro_batch.by_rollout(facts["sampled_log_ratio"])
        positions = micro_batch.by_rollout(micro_batch.tokens.positions)
        return torch.cat([step_weights(*pair, self.slack) for pair in zip(log_ratios, positions, strict=True)])

    def _noted(self, trained: TrainedRollout) -> Rollout:
        rollout = trained.rollout
        weights = torch.zeros(len(rollout.response_ids))
        places = rollout.trained_positions
        weights[places] = step_weights(trained.facts["sampled_log_ratio"], places, self.slack).float()
        return replace(rollout, extras={**rollout.extras, STEP_WEIGHT: weights})


def step_weights(log_ratios: Tensor, positions: Tensor, slack: float) -> Tensor:
    """Weight of each of the student's tokens in one response [T], float64.

    Args:
        log_ratios: [T] of these tokens.
        positions: int64 [T], where they stand in the response; a gap begins a new turn.
        slack: Weights are at most 1 + slack.
    """
    begins = torch.ones_like(positions)
    begins[1:] = (positions[1:] != positions[:-1] + 1).long()
    turns = begins.cumsum(0) - 1
    count = int(turns[-1]) + 1 if len(turns) else 0
    sums = torch.zeros(count, dtype=torch.float64, device=log_ratios.device)
    sums.index_add_(0, turns, log_ratios.abs().double())
    distances = sums / turns.bincount(minlength=count).clamp(min=1)
    weights = ((distances[:1] + EPSILON) / (distances + EPSILON)).clamp(max=1 + slack)
    weights[:1] = 1
    return weights[turns]
