"""Prune-OPD: fade what comes after the student has drifted away, and generate less of it (arXiv 2605.07804)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import MicroBatch, Normalizer, StepFacts, TokenWeighting
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives.arguments import check_one_of
from opd_lightning.rollouts.horizon import Horizon

Sign = Literal["overlap", "nucleus"]


class DriftWeights(TokenWeighting):
    """A token counts base + max(0, 1 - drop x the bad tokens up to it); it is bad where the two top-k lists part.

    Bad is a token whose lists overlap by less than `overlap` (`overlap_ratio`; k is `model.top_k_metrics`, 16 there as
    in the paper), or, by the other sign, one outside of the teacher's nucleus (`teacher_mass_above`). Weights never
    rise along a response: what follows a drift says little, good as it may look.

    Args:
        overlap: Share of the top k that both must have in common.
        drop: What each bad token takes.
        base: What a token counts at the end of all trust.
        normalizer: What the weighted sum is divided by. Without bad tokens every weight is 1 + base, so "all_tokens",
            the published form, makes steps 1.5 times as large; "kept_tokens" makes them those of plain distillation.
        sign: What is a bad token: one at which the lists "overlap" too little, or one that was sampled outside of the
            teacher's "nucleus". Where its k likeliest tokens hold less than the nucleus, all of them are in it.
        nucleus: Mass of the teacher's nucleus.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2605.07804, at second hand: the authors' code is not public.
    """

    def __init__(
        self,
        overlap: float = 0.7,
        drop: float = 0.01,
        base: float = 0.5,
        normalizer: Normalizer = "all_tokens",
        sign: Sign = "overlap",
        nucleus: float = 0.95,
    ) -> None:
        _check_drift(overlap, drop, sign, nucleus, "model.token_weighting")
        if not 0 <= base < math.inf:
            raise ValueError(f"model.token_weighting.base: expected a number of at least 0, got {base}.")
        self.overlap, self.drop, self.base, self.normalizer = overlap, drop, base, normalizer
        self.sign, self.nucleus = sign, nucleus
        self.reads = (_FACTS[sign],)

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        bad = _bad_tokens(facts, self.sign, self.overlap, self.nucleus)
        return self.base + torch.cat([trust(each, self.drop) for each in micro_batch.by_rollout(bad)])


class PruningHorizon(Horizon):
    """Grows while enough responses can be trusted to their end, and shrinks when they no longer can.

    A response is trusted for as many tokens as still have trust (see `DriftWeights`). Where a share `share` of a step's
    responses is trusted to within `margin` tokens of the horizon, the horizon grows by `change`; after `patience` steps
    in a row without, it shrinks by as much.

    Args:
        start: Response tokens of the first step; the paper names 1024, 2048 and 6144 in different places.
        least: Fewest tokens.
        most: Most tokens; `data.sampling.max_new_tokens` limits them too.
        change: Tokens by which it grows and shrinks.
        margin: Tokens that may be missing to the horizon.
        share: Of the step's responses, all processes.
        patience: Steps.
        overlap: As in `DriftWeights`.
        drop: As in `DriftWeights`.
        sign: As in `DriftWeights`.
        nucleus: As in `DriftWeights`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        start: int = 2048,
        least: int = 1024,
        most: int = 12288,
        change: int = 100,
        margin: int = 100,
        share: float = 0.1,
        patience: int = 3,
        overlap: float = 0.7,
        drop: float = 0.01,
        sign: Sign = "overlap",
        nucleus: float = 0.95,
    ) -> None:
        check_at_least(1, "data.horizon", start=start, change=change, patience=patience)
        check_at_least(0, "data.horizon", margin=margin)
        if not 1 <= least <= start <= most:
            raise ValueError(
                f"data.horizon.start: expected 1 <= least={least} <= start={start} <= most={most}. Set all three"
                " to fit data.sampling.max_new_tokens."
            )
        if not share > 0:
            raise ValueError(f"data.horizon.share: expected a number above 0, got {share}.")
        _check_drift(overlap, drop, sign, nucleus, "data.horizon")
        self.start, self.least, self.most = start, least, most
        self.change, self.margin, self.share, self.patience = change, margin, share, patience
        self.overlap, self.drop, self.sign, self.nucleus = overlap, drop, sign, nucleus
        self.reads = (_FACTS[sign],)
        self._tokens, self._misses = start, 0
        self._settled: dict[int, int] = {}

    @override
    def num_tokens(self, step: int) -> int:
        self._settled = {other: tokens for other, tokens in self._settled.items() if other >= step - 2}
        return self._settled.setdefault(step, self._tokens)

    @override
    def observe(self, facts: StepFacts) -> None:
        horizon = self._settled.get(facts.step, self._tokens)  # of the step that was trained, not of the next
        trusted = [
            int((trust(_bad_tokens(each.facts, self.sign, self.overlap, self.nucleus), self.drop) > 0).sum())
            for each in facts.rollouts
        ]
        reached = [tokens >= horizon - self.margin for tokens in trusted]
        counts = gather_objects((sum(reached), len(reached)))
        if sum(count for count, _ in counts) >= self.share * sum(number for _, number in counts):
            self._tokens, self._misses = min(self._tokens + self.change, self.most), 0
            return
        self._misses += 1
        if self._misses >= self.patience:
            self._tokens, self._misses = max(self._tokens - self.change, self.least), 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "misses": self._misses, "settled": dict(self._settled)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tokens, self._misses = state.get("tokens", self.start), state.get("misses", 0)
        self._settled = dict(state.get("settled", {}))


_FACTS: dict[Sign, str] = {"overlap": "overlap_ratio", "nucleus": "teacher_mass_above"}


def _bad_tokens(facts: Mapping[str, Tensor], sign: Sign, overlap: float, nucleus: float) -> Tensor:
    """Which tokens are bad, bool [N]."""
    values = facts[_FACTS[sign]]
    return values < overlap if sign == "overlap" else values >= nucleus


def trust(bad: Tensor, drop: float) -> Tensor:
    """max(0, 1 - drop x the bad tokens up to each), of the tokens of one response, bool [T]."""
    number = bad.cumsum(0)
    return (1 - drop * number).clamp(0, 1).where(drop * number < 1 - 1e-6, 0.0)  # a hundred times 0.01 is all of it


def _check_drift(overlap: float, drop: float, sign: str, nucleus: float, where: str) -> None:
    check_one_of(f"{where}.sign", sign, get_args(Sign))
    if not 0 <= overlap <= 1:
        raise ValueError(f"{where}.overlap: expected a share from 0 to 1, got {overlap}.")
    if not 0 <= drop <= 1:
        raise ValueError(f"{where}.drop: expected a number from 0 to 1, got {drop}.")
    if not 0 < nucleus < 1:
        raise ValueError(f"{where}.nucleus: expected a mass between 0 and 1, got {nucleus}.")
