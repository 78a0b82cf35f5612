"""Scores of tokens that different teachers have scored, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import TeacherScores


class JoinedScores(TeacherScores):
    """N response tokens, each scored by one of several teachers.

    Args:
        response_ids: int64 [N], the sampled tokens.
        parts: Places int64 [M] of some tokens, ascending and on the CPU, and their scores; each token is in one part.
    """

    def __init__(self, response_ids: Tensor, parts: Sequence[tuple[Tensor, TeacherScores]]) -> None:
        assert sum(len(places) for places, _ in parts) == len(response_ids), "each token has one teacher"
        self.response_ids = response_ids
        self.knows_full = all(scores.knows_full for _, scores in parts)
        self._parts = parts

    @override
    def slice(self, start: int, stop: int) -> JoinedScores:
        ends = torch.tensor([start, stop])
        parts = []
        for places, scores in self._parts:
            first, last = torch.searchsorted(places, ends).tolist()
            parts.append((places[first:last] - start, scores.slice(first, last)))
        return JoinedScores(self.response_ids[start:stop], parts)

    @override
    def full(self) -> Tensor:
        return self._join([scores.full() for _, scores in self._parts])

    @override
    def sampled(self) -> Tensor:
        return self._join([scores.sampled() for _, scores in self._parts])

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        return self._join([scores.at(token_ids[self._here(places)]) for places, scores in self._parts])

    @override
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        lists = [scores.topk(k) for _, scores in self._parts]
        return self._join([ids for ids, _ in lists]), self._join([log_probs for _, log_probs in lists])

    def _join(self, answers: Sequence[Tensor]) -> Tensor:
        """Put rows back to where their tokens are."""
        joined = answers[0].new_empty(len(self.response_ids), *answers[0].shape[1:])
        for (places, _), rows in zip(self._parts, answers, strict=True):
            joined[self._here(places)] = rows
        return joined

    def _here(self, places: Tensor) -> Tensor:
        return places.to(self.response_ids.device)
