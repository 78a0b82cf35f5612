"""BRTS: beside each answer of the student, the best of the teacher's own answers to the prompt (arXiv 2605.09725)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.distributed import gather_objects, is_sharded
from opd_lightning.interfaces import (
    LiveStudent,
    Problem,
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutEngine,
    RolloutSource,
    Sampling,
    StepPrompts,
    Tokenizer,
)
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.batching import collate, cut_by_tokens, sequence_length
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.shaping import attach
from opd_lightning.rollouts.stored import Stored

_TOKENS_AT_ONCE = 16384  # of the student's answers, padded, to find its likeliest tokens
_STATES_AT_ONCE = 512


class BestOfTeacher(RolloutSource):
    """The student's own answers, and beside each of them one answer of the teacher, chosen among several.

    Half of `data.rollouts_per_prompt` are the student's; its i-th has the (n / 2 + i)-th of the prompt beside it. That
    is chosen among `num_candidates` stored ones: of those that are right the one most like the student's answer, which
    is the largest share of its tokens that are among the student's `k` likeliest at the same place of the student's
    answer. Where none is right, an answer of `recovered` if that is right, else the most alike of all. Of equals the
    first one is taken. The teacher is frozen, so that its answers can be written beforehand.

    Args:
        candidates: Answers of the teacher with marks: a file of `opd-lightning rollout --num_samples ...`.
        recovered: Its answers to prompts that tell the solution, for problems at which it fails; null for none.
        num_candidates: Answers to choose among for each answer of the student (N).
        k: Length of the student's list of likeliest tokens.
        right_from: The least mark of a right answer.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2605.09725 and the authors' code.
    """

    def __init__(
        self,
        candidates: Stored,
        recovered: Stored | None = None,
        num_candidates: int = 4,
        k: int = 16,
        right_from: float = 1.0,
    ) -> None:
        check_at_least(1, "source", num_candidates=num_candidates, k=k)
        if not 0 < right_from <= 1:
            raise ValueError(f"source.right_from: expected a mark in (0, 1], got {right_from}.")
        self.candidates, self.recovered = candidates, recovered
        self.num_candidates, self.k, self.right_from = num_candidates, k, right_from
        self._own = OnPolicy()

    asks_engine = True

    @property
    @override
    def staleness(self) -> None:
        return None

    @override
    def setup(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._own.setup(engine)

    @override
    def knows_log_probs(self, sampling: Sampling) -> bool:
        return False

    @override
    def admit(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, sampling: Sampling, num_rollouts: int
    ) -> list[Problem]:
        if num_rollouts % 2:
            raise ValueError(
                "data.rollouts_per_prompt: BestOfTeacher puts an answer of the teacher beside each of the student's, so"
                f" it takes an even number, got {num_rollouts}. Set it to 2."
            )
        wanted = self.num_candidates * num_rollouts // 2
        fewer = f"lower data.source.num_candidates, now {self.num_candidates} for each answer of the student"
        admitted = self.candidates.admit(problems, tokenizer, sampling, wanted, fewer)
        if self.recovered is not None:
            self.recovered.admit(admitted, tokenizer, sampling, 1)
        files = {"candidates": self.candidates} | ({} if self.recovered is None else {"recovered": self.recovered})
        for name, file in files.items():
            for problem in admitted:
                if any(map(math.isnan, file.marks(problem))):
                    raise ValueError(
                        f"source.{name}: answers to {problem.uid!r} in {file.path!r} have no marks, and BestOfTeacher"
                        " chooses right ones. Write the file anew with a task that marks all its problems."
                    )
        return admitted

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        if self.num_candidates > 1 and is_sharded(student.model):  # whoever is in no doubt would wait for the others
            raise ValueError(
                "data.source: BestOfTeacher runs the student itself, which under fsdp2 all processes must do equally"
                " often. Set trainer.strategy: ddp, or source.num_candidates: 1."
            )
        num_own = len(step.prompts[0].seeds) // 2 if step.prompts else 0
        asked = tuple(replace(prompt, seeds=prompt.seeds[:num_own]) for prompt in step.prompts)
        batch = self._own.rollouts(replace(step, prompts=asked), sampling, student)
        started = time.perf_counter()
        pools = [
            pool
            for prompt in step.prompts
            for pool in self._pools(prompt, prompt.seeds[num_own:], sampling, student.spec.tokenizer)
        ]
        chosen = self._choose(batch.rollouts, pools, student)
        rollouts: list[Rollout] = []
        for i, prompt in enumerate(step.prompts):
            pairs = slice(i * num_own, (i + 1) * num_own)
            beside = [
                replace(each, seed=seed, reward=math.nan, log_probs=torch.full_like(each.log_probs, math.nan))
                for each, seed in zip(chosen[pairs], prompt.seeds[num_own:], strict=True)
            ]
            for rollout in beside:
                student.announce(rollout, step.step)
            rollouts += [*_told(batch.rollouts[pairs], 0.0), *_told(beside, 1.0)]
        batch.seconds["generate"] += time.perf_counter() - started
        return replace(batch, rollouts=with_shares(rollouts), staleness=None)

    def _pools(
        self, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, tokenizer: Tokenizer
    ) -> list[list[Rollout]]:
        """What there is to choose among beside each of the student's answers to a prompt."""
        count = self.num_candidates
        drawn = tuple(derive_seed(seed, "candidate", j) for seed in seeds for j in range(count))
        candidates = self.candidates.answers(replace(prompt, seeds=drawn), sampling, tokenizer)
        recovered: list[Rollout] = []
        if self.recovered is not None and self.recovered.marks(prompt.problem):
            recovered = self.recovered.answers(replace(prompt, seeds=tuple(seeds)), sampling, tokenizer)
        return [
            eligible(candidates[i * count : (i + 1) * count], recovered[i : i + 1], self.right_from)
            for i in range(len(seeds))
        ]

    def _choose(
        self, own: Sequence[Rollout], pools: Sequence[Sequence[Rollout]], student: LiveStudent
    ) -> list[Rollout]:
        in_doubt = [rollout for rollout, pool in zip(own, pools, strict=True) if len(pool) > 1]
        lists = likeliest_tokens(student, in_doubt, self.k)
        return [
            max(pool, key=lambda each: likeness(each.response_ids, lists[id(rollout)])) if len(pool) > 1 else pool[0]
            for rollout, pool in zip(own, pools, strict=True)
        ]

    @override
    def state_dict(self) -> dict[str, Any]:
        recovered = {} if self.recovered is None else self.recovered.state_dict()
        return {"candidates": self.candidates.state_dict(), "recovered": recovered}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the files.

        Raises:
            ValueError: One has changed, or `recovered` was given only before or is given only now.
        """
        if "recovered" in state and bool(state["recovered"]) != (self.recovered is not None):
            had, has = ("none", "some") if self.recovered is not None else ("some", "none")
            raise ValueError(
                f"data.source.recovered: the checkpoint was written with {had}, now there are {has}. Resume with the"
                " same, or start a new run from the checkpoint's weights (opd-lightning export, then student.path)."
            )
        self.candidates.load_state_dict(state.get("candidates", {}))
        if self.recovered is not None:
            self.recovered.load_state_dict(state.get("recovered", {}))


def eligible(candidates: Sequence[Rollout], recovered: Sequence[Rollout], right_from: float) -> list[Rollout]:
    """The answers that likeness decides between: the right ones, else those recovered that are right, else all.

    Args:
        candidates: With their marks.
        recovered: With their marks; may be empty.
        right_from: The least mark of a right answer.
    """
    right = [each for each in candidates if each.reward >= right_from]
    return right or [each for each in recovered if each.reward >= right_from] or list(candidates)


def likeness(token_ids: Tensor, lists: Tensor) -> float:
    """Share of an answer's tokens that are in the student's list at the same place; as far as both answers go.

    Args:
        token_ids: int64 [T] of the answer.
        lists: int64 [S, k], the student's likeliest tokens at the S places of its own answer.
    """
    length = min(len(token_ids), len(lists))
    if length == 0:
        return 0.0
    return float((token_ids[:length, None] == lists[:length]).any(-1).double().mean())


@torch.no_grad()
def likeliest_tokens(student: LiveStudent, rollouts: Sequence[Rollout], k: int) -> dict[int, Tensor]:
    """The student's k likeliest tokens [T, k] at each place of rollouts, on the CPU, by the rollout's `id`."""
    if not rollouts:
        return {}
    found: dict[int, Tensor] = {}
    most = max([_TOKENS_AT_ONCE, *map(sequence_length, rollouts)])
    device = next(student.model.parameters()).device
    with student.autocast(), evaluation_mode(student.model):
        for group in cut_by_tokens(rollouts, most):
            batch = collate(group, student.spec.tokenizer.pad_id).to(device)
            hidden, head = student.spec.hidden_states(student.model, batch), student.spec.head(student.model)
            ids = [
                head(part).topk(min(k, head.num_rows)).indices.cpu() for part in torch.split(hidden, _STATES_AT_ONCE)
            ]
            for rollout, lists in zip(group, batch.by_rollout(torch.cat(ids)), strict=True):
                found[id(rollout)] = lists
    return found


def with_shares(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Attach `context_share`, how many times as many tokens the step has as there are of this rollout's kind.

    Counts are those of all processes, so that the mean over a kind becomes a mean over the step.
    """
    counts = [0, 0]
    for rollout in rollouts:
        counts[_is_teachers(rollout)] += rollout.num_trained
    own, theirs = (sum(column) for column in zip(*gather_objects(counts), strict=True))
    shares = [(own + theirs) / max(count, 1) for count in (own, theirs)]
    return [
        attach(rollout, context_share=torch.full((len(rollout.response_ids),), shares[_is_teachers(rollout)]))
        for rollout in rollouts
    ]


def _told(rollouts: Sequence[Rollout], kind: float) -> list[Rollout]:
    return [attach(each, teacher_context=torch.full((len(each.response_ids),), kind)) for each in rollouts]


def _is_teachers(rollout: Rollout) -> bool:
    return bool(rollout.extras["teacher_context"].any())
