"""What the facts of tokens are made of, read while both models' logits are there."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from opd_lightning.interfaces import ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives.blocks import Block
from opd_lightning.objectives.facts import facts_from_few, known_facts
from opd_lightning.objectives.logprobs import close_slots
from opd_lightning.objectives.top_tokens import top_tokens


class FactReadings:
    """A few numbers of every token so far, block by block.

    Args:
        asked: What the teacher was asked for, and so can tell; None without a teacher.
        k: Size of the top-k lists.
    """

    def __init__(self, asked: ScoreRequest | None, k: int) -> None:
        self._wanted = known_facts(asked, k)
        self._k = k
        self._few: dict[str, list[Tensor]] = defaultdict(list)
        self._settled: dict[str, list[Tensor]] = defaultdict(list)
        self._student_ids: Tensor | None = None
        self._teacher_ids: Tensor | None = None

    def begin(
        self, logits: Tensor, teacher_logits: Tensor | None, teacher: TeacherScores | None, tokens: ResponseTokens
    ) -> None:
        """Find the likeliest tokens of n positions, whose blocks will then be read.

        Args:
            logits: [n, V] of the student, tempered or not.
            teacher_logits: [n, V] of the teacher; None where only single scores of it are at hand.
            teacher: Those scores.
            tokens: The n tokens.
        """
        k = min(self._k, logits.shape[-1])
        self._student_ids = self._list("top_ids", logits, k, tokens)
        if teacher_logits is not None:
            self._teacher_ids = self._list("teacher_top_ids", teacher_logits, k, tokens)
        elif teacher is not None:
            if "sampled_log_ratio" in self._wanted:
                self._few["teacher_sampled"].append(close_slots(teacher.sampled().to(logits)))
            if "overlap_ratio" in self._wanted:
                ids, log_probs = teacher.topk(k)
                self._few["teacher_top_ids"].append(ids)
                self._few["teacher_top_log_probs"].append(close_slots(log_probs.to(logits)))

    def read(self, block: Block, rows: slice) -> None:
        """Read one block, at its rows of these positions."""
        assert self._student_ids is not None
        self._few["log_probs"].append(block.log_p.gather(-1, self._student_ids[rows]))
        self._few["student_entropy"].append(block.student_entropy)
        if self._teacher_ids is not None:
            self._few["teacher_log_probs"].append(block.log_q.gather(-1, self._teacher_ids[rows]))
        if "reverse_kl" in self._wanted:
            self._few["reverse_kl"].append(block.reverse_kl)
            self._few["forward_kl"].append(block.forward_kl)
            self._few["teacher_entropy"].append(block.teacher_entropy)

    def settle(self) -> None:
        """Join what was read since the last time: a tensor of a few numbers takes a kilobyte."""
        for name, parts in self._few.items():
            self._settled[name].append(torch.cat(parts))
        self._few.clear()

    def facts(self, tokens: ResponseTokens) -> dict[str, Tensor]:
        """Facts of all tokens read and settled, float32 [N] by name."""
        few = {name: torch.cat(parts) for name, parts in self._settled.items()}
        few["sampled"], few["top_log_probs"] = _first_and_rest(few.pop("log_probs"))
        if "teacher_log_probs" in few:
            few["teacher_sampled"], few["teacher_top_log_probs"] = _first_and_rest(few.pop("teacher_log_probs"))
        if "reverse_kl" in few:
            few["entropy_gap"] = (few["teacher_entropy"] - few["student_entropy"]).abs()
        facts = facts_from_few(few, tokens)
        return {name: facts[name] for name in self._wanted}

    def _list(self, name: str, logits: Tensor, k: int, tokens: ResponseTokens) -> Tensor:
        """Keep the likeliest ids by a name, and give them with the sampled ones before them."""
        ids = top_tokens(logits, k)[1]
        self._few[name].append(ids)
        return torch.cat([tokens.ids[:, None], ids], dim=-1)


def _first_and_rest(columns: Tensor) -> tuple[Tensor, Tensor]:
    return columns[:, 0], columns[:, 1:]
