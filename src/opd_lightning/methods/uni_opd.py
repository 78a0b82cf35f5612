"""Uni-OPD's margin: right answers must lead wrong ones in what the teacher says of them (arXiv 2605.03677)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Advantage, ResponseTokens, Rollout, TeacherScores
from opd_lightning.objectives.arguments import check_one_of
from opd_lightning.objectives.marks import marks_of
from opd_lightning.rollouts.shaping import attach

Statistic = Literal["mean", "minmax"]
Direction = Literal["spread", "lift", "lower"]


@dataclass(frozen=True)
class Margin:
    """By how much right answers lead wrong ones, and by how much they should.

    An answer's return is the mean of its tokens' log-ratios, log q(y) - log p(y). Only prompts with right and wrong
    answers have a lead.

    Args:
        wanted: The least lead, in nats: 0.4 in the paper's runs on text, 0 in those with images.
        statistic: The lead is that of the "mean" return of right answers over that of wrong ones, or of the worst right
            one over the best wrong one ("minmax").
        right_from: The least mark of a right answer.

    Raises:
        ValueError: A setting is outside its range.
    """

    wanted: float = 0.4
    statistic: Statistic = "mean"
    right_from: float = 1.0

    def __post_init__(self) -> None:
        check_one_of("margin.statistic", self.statistic, get_args(Statistic))
        if not self.wanted >= 0:
            raise ValueError(f"margin.wanted: expected a number of at least 0, got {self.wanted}.")
        if not 0 < self.right_from <= 1:
            raise ValueError(f"margin.right_from: expected a mark in (0, 1], got {self.right_from}.")

    def lead(self, returns: Tensor, is_right: Tensor) -> float:
        """The lead among returns [n]; both kinds of answers must be there."""
        right, wrong = returns[is_right], returns[~is_right]
        if self.statistic == "mean":
            return float(right.mean() - wrong.mean())
        return float(right.min() - wrong.max())

    def of_group(self, group: Sequence[Rollout], owner: str) -> tuple[Tensor, Tensor]:
        """Returns [n] in float64, and which answers are right."""
        is_right = marks_of(group, owner) >= self.right_from
        # NaN where nothing of an answer is trained on (`BalancedMarks`)
        returns = [rollout.extras["log_ratio"][rollout.trained_positions].double().mean() for rollout in group]
        return torch.stack(returns), is_right


class _ByGroup(Advantage):
    """What one number per answer makes of its rewards.

    Args:
        margin: The lead that is wanted.
    """

    needs_log_ratios = True
    compares_marks = True
    neutral = 0.0  # the number where all answers are of one kind

    def __init__(self, margin: Margin) -> None:
        self.margin = margin

    @abstractmethod
    def numbers(self, returns: Tensor, is_right: Tensor) -> Tensor:
        """One number [n] per answer of a group with right and wrong ones."""

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        shaped = []
        for group in groups:
            returns, is_right = self.margin.of_group(group, f"objective.advantage: {type(self).__name__}")
            numbers = torch.full_like(returns, self.neutral)
            counts = ~returns.isnan()
            if is_right[counts].any() and not is_right[counts].all():
                numbers[counts] = self.numbers(returns[counts], is_right[counts]).to(numbers)
            shaped.append(
                [
                    attach(rollout, margin=torch.full((len(rollout.response_ids),), float(number)))
                    for rollout, number in zip(group, numbers, strict=True)
                ]
            )
        return shaped


class MarginShift(_ByGroup):
    """Shift whole answers until the right ones lead the wrong ones by a margin; inside an answer nothing changes.

    The shift is margin - lead, where that is positive, on every token of the right answers ("lift"), minus that on
    those of the wrong ones ("lower"), or half of it on each ("spread").

    Args:
        margin: The lead that is wanted.
        direction: Who is shifted. The paper's runs on text spread, those with images lift; its text presents lifting
            with "minmax".

    Raises:
        ValueError: A setting is outside its range.

    Source: arXiv 2605.03677 and the authors' code.
    """

    def __init__(self, margin: Margin = Margin(), direction: Direction = "spread") -> None:
        super().__init__(margin)
        check_one_of("advantage.direction", direction, get_args(Direction))
        self.direction: Direction = direction

    @override
    def numbers(self, returns: Tensor, is_right: Tensor) -> Tensor:
        missing = max(0.0, self.margin.wanted - self.margin.lead(returns, is_right))
        up, down = {"lift": (1.0, 0.0), "lower": (0.0, 1.0), "spread": (0.5, 0.5)}[self.direction]
        return torch.where(is_right, up * missing, -down * missing)

    @override
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        return rewards + tokens.extras["margin"].to(rewards)


class MarginMask(_ByGroup):
    """Leave out whole answers, the most harmful first, until the right ones lead the wrong ones by a margin.

    The most harmful one is that whose removal raises the lead most: the right answer with the least return, or the
    wrong one with the largest. One of each kind stays. An answer that is left out has an advantage of 0, and its tokens
    still count in the mean.

    Args:
        margin: The lead that is wanted.
        least_kept: Least share of a prompt's answers that stay.

    Raises:
        ValueError: A setting is outside its range.

    Source: the authors' code of arXiv 2605.03677.
    """

    neutral = 1.0

    def __init__(self, margin: Margin = Margin(), least_kept: float = 0.25) -> None:
        super().__init__(margin)
        if not 0 < least_kept <= 1:
            raise ValueError(f"advantage.least_kept: expected a number in (0, 1], got {least_kept}.")
        self.least_kept = least_kept

    @override
    def numbers(self, returns: Tensor, is_right: Tensor) -> Tensor:
        kept = torch.ones_like(is_right)
        while self.margin.lead(returns[kept], is_right[kept]) < self.margin.wanted:
            if int(kept.sum()) - 1 < self.least_kept * len(kept):
                break
            leads = {}
            for kind, worst in ((is_right, torch.argmin), (~is_right, torch.argmax)):
                places = (kept & kind).nonzero().squeeze(-1)
                if len(places) < 2:
                    continue
                place = int(places[worst(returns[places])])
                without = kept.clone()
                without[place] = False
                leads[place] = self.margin.lead(returns[without], is_right[without])
            if not leads:
                break
            kept[max(leads, key=lambda place: leads[place])] = False
        return kept.to(returns)

    @override
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        return rewards * tokens.extras["margin"].to(rewards)
