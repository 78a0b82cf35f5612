"""Teacher scores kept as hidden states, turned into log-probabilities only for what is asked."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import LinearHead, TeacherScores
from opd_lightning.objectives.head_products import write_logits

_ENTRIES_AT_ONCE = 2**27  # float32 log-probabilities held at a time: 512 MiB


class HiddenScores(TeacherScores):
    """Final hidden states [N, H] of a model in this process, and its head.

    Hidden states are some hundred times smaller than log-probabilities of a large vocabulary, so a whole step's can be
    kept. A slice computes its log-probabilities once, whatever is asked of it and how often; a large object answers in
    parts, so that no more than 512 MiB of them exist.

    Args:
        hidden: [N, H].
        response_ids: int64 [N], the sampled tokens.
        head: Turns hidden states into logits of the shared vocabulary.
        temperature: Divides the logits.
        in_autocast: Whether the head runs in the surrounding autocast context, as the student's does, or in the dtype
            of its weight.
    """

    def __init__(
        self,
        hidden: Tensor,
        response_ids: Tensor,
        head: LinearHead,
        temperature: float = 1.0,
        *,
        in_autocast: bool = False,
    ) -> None:
        self._hidden = hidden
        self.response_ids = response_ids
        self._head = head
        self._temperature = temperature
        self._in_autocast = in_autocast
        self._log_probs: Tensor | None = None

    @override
    def slice(self, start: int, stop: int) -> HiddenScores:
        part = self._like(self._hidden[start:stop], self.response_ids[start:stop])
        part._log_probs = None if self._log_probs is None else self._log_probs[start:stop]
        return part

    @override
    def at(self, token_ids: Tensor) -> Tensor:
        return torch.cat([part.full().gather(-1, token_ids[rows]) for rows, part in self._parts()])

    @override
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        answers = [part.full().topk(min(k, self._head.num_rows), dim=-1) for _, part in self._parts()]
        return torch.cat([ids for _, ids in answers]), torch.cat([log_probs for log_probs, _ in answers])

    @override
    def full(self) -> Tensor:
        if self._log_probs is None:
            with torch.no_grad(), self._precision():
                logits = self._head(self._input())
                if self._temperature != 1:
                    logits = logits / self._temperature
                self._log_probs = logits.log_softmax(dim=-1)
        return self._log_probs

    @override
    def columns(self) -> dict[str, Tensor]:
        return {"hidden": self._hidden, "response_ids": self.response_ids}

    @override
    def from_columns(self, columns: Mapping[str, Tensor]) -> HiddenScores:
        return self._like(columns["hidden"], columns["response_ids"])

    @override
    def hidden(self) -> tuple[Tensor, LinearHead]:
        return self._hidden, self._head

    def _like(self, hidden: Tensor, response_ids: Tensor) -> HiddenScores:
        return HiddenScores(hidden, response_ids, self._head, self._temperature, in_autocast=self._in_autocast)

    @override
    def write_logits(self, out: Tensor) -> bool:
        with torch.no_grad(), self._precision():
            write_logits(self._head, self._input(), out)
            if self._temperature != 1:
                out.div_(self._temperature)
        return True

    def _input(self) -> Tensor:
        return self._hidden if self._in_autocast else self._hidden.to(self._head.weight.dtype)

    def _precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self._in_autocast else torch.autocast(self._hidden.device.type, enabled=False)

    def _parts(self) -> Iterator[tuple[builtins.slice, HiddenScores]]:
        """This object itself when its log-probabilities are small enough to keep, else slices that are."""
        size = max(1, _ENTRIES_AT_ONCE // self._head.num_rows)
        if self.num_tokens <= size:
            yield slice(None), self
            return
        for start in range(0, self.num_tokens, size):
            rows = slice(start, min(start + size, self.num_tokens))
            yield rows, self.slice(rows.start, rows.stop)
