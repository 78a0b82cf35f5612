"""What is rehearsed, and what becomes known by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from opd_lightning.interfaces import (
    MicroBatch,
    Objective,
    Problem,
    ResponseTokens,
    Rollout,
    Sampling,
    ScoreRequest,
    Student,
    Teacher,
)


@dataclass(frozen=True)
class Case:
    """What is rehearsed: the step of one process.

    Attributes:
        student: What is trained.
        make_optimizer: Of its trained weights.
        objective: What is minimised.
        teacher: A teacher in this process; None without one.
        request: What it is asked.
        prompt_tokens: Of the longest prompt.
        response_tokens: Of every answer.
        num_rollouts: Answers of a step.
        rollouts_per_prompt: Answers to each prompt.
        max_tokens: Most padded tokens of a micro-batch.
        facts_k: Size of the top-k lists of the facts.
        counts_alike: Whether all tokens do.
        in_bfloat16: Whether products run under bfloat16 autocast.
        sampling: How tokens are drawn.
        engine_rows: Answers generated at once in this process; 0 where it does not generate.
        num_copies: Copies of the trained weights beside them, between steps.
        extras: Names of what the objective attaches to tokens.
    """

    student: Student
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    objective: Objective
    teacher: Teacher | None
    request: ScoreRequest | None
    prompt_tokens: int
    response_tokens: int
    num_rollouts: int
    rollouts_per_prompt: int = 1
    max_tokens: int = 16384
    facts_k: int = 16
    counts_alike: bool = True
    in_bfloat16: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    engine_rows: int = 256
    num_copies: int = 0
    extras: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Tokens of a whole rollout."""
        return self.prompt_tokens + self.response_tokens

    @property
    def rows(self) -> int:
        """Rollouts of the largest micro-batch."""
        return -(-self.num_rollouts // self.num_micro_batches)  # they are evened out

    @property
    def num_micro_batches(self) -> int:
        """Of a step."""
        return -(-self.num_rollouts // max(1, self.max_tokens // self.length))

    def autocast(self, *, is_cached: bool = False) -> AbstractContextManager[Any]:
        """The precision of the training; weights that were cast stay so where it `is_cached`, as in `HFEngine`."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=is_cached)


@dataclass(frozen=True)
class Phase:
    """A part of the step.

    Attributes:
        name: As in `train/seconds/*`.
        peak: Bytes held at its worst moment, by what holds them.
        seconds: Of the whole step's.
        flops: Of matrix products, of the whole step.
        bytes: Read and written, of the whole step.
        num_calls: Operations of torch, of the whole step.
    """

    name: str
    peak: Mapping[str, int]
    seconds: float
    flops: float
    bytes: float
    num_calls: float

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.peak.values())


@dataclass(frozen=True)
class SharedTeacher:
    """One whose body processes share where they share the student (FSDP2).

    Attributes:
        body_bytes: Of all but the head.
        gathered_bytes: Of what is outside its layers and of one layer: whole on each process while it scores.
        head_bytes: Of the head, whole on each process.
    """

    body_bytes: int
    gathered_bytes: int
    head_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """What became known.

    Attributes:
        phases: The parts of a step.
        trained_bytes: Of the trained weights.
        gathered_bytes: Of the student's weights outside its layers and of one layer: what a device of several that
            share the weights holds of them at once.
        gathered_gradient_bytes: Of the trained ones among these: their gradients are whole before they are shared.
        shared_teacher: The teacher as such a device holds it; None where it is whole on each.
        resting_bytes: Of the teacher, while it rests in the memory of the processor; None where it stays.
        scores_bytes: Of the teacher's scores of all micro-batches but one.
        saved_bytes: Which the quantised teacher does without.
        is_fused: Whether the optimiser's step makes no copy of the weights on a GPU.
    """

    phases: Sequence[Phase]
    trained_bytes: int
    gathered_bytes: int
    gathered_gradient_bytes: int = 0
    shared_teacher: SharedTeacher | None = None
    resting_bytes: int | None = None
    scores_bytes: int = 0
    saved_bytes: int = 0
    is_fused: bool = False


def micro_batch(case: Case) -> MicroBatch:
    """The largest one of the step, of rollouts that are all as long as they may be."""
    rows, length, num_tokens = case.rows, case.length, case.rows * case.response_tokens
    ids, zeros = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(num_tokens)
    rollout = Rollout(Problem("", ()), ids, ids, zeros, finished=True, seed=0)
    return MicroBatch(
        input_ids=torch.zeros(rows, length, dtype=torch.int64),
        attention_mask=torch.ones(rows, length, dtype=torch.int64),
        position_ids=torch.zeros(rows, length, dtype=torch.int64),
        rows=ids,
        columns=ids.clone(),
        tokens=ResponseTokens(ids.clone(), zeros, ids.clone(), dict.fromkeys(case.extras, zeros)),
        rollouts=(rollout,) * rows,
    )
