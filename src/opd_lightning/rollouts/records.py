"""Rollouts as plain values: with tensors for checkpoints, and as columns for files that people and other tools read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from opd_lightning.interfaces import Problem, Rollout


def to_record(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout but its problem."""
    return {
        "prompt_ids": rollout.prompt_ids.to(torch.int32),
        "seed": rollout.seed,
        "response_ids": rollout.response_ids.to(torch.int32),
        "log_probs": rollout.log_probs,
        "finished": rollout.finished,
        "text": rollout.text,
        "reward": rollout.reward,
        "student_wrote": rollout.student_wrote,
    }


def from_record(record: Mapping[str, Any], problem: Problem) -> Rollout:
    """The rollout of `to_record`, as an answer to its problem."""
    return Rollout(
        problem=problem,
        prompt_ids=record["prompt_ids"].to(torch.int64),
        response_ids=record["response_ids"].to(torch.int64),
        log_probs=record["log_probs"],
        finished=record["finished"],
        seed=record["seed"],
        text=record["text"],
        reward=record.get("reward", math.nan),  # absent from older checkpoints
        student_wrote=record["student_wrote"],
    )


def to_groups(rollouts: Sequence[Rollout], sizes: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The records of rollouts, those of a prompt together (two prompts of a step may ask the same).

    Args:
        rollouts: The rollouts of a prompt next to each other.
        sizes: Rollouts of each prompt.
    """
    remaining = iter(rollouts)
    return [[to_record(rollout) for rollout in islice(remaining, size)] for size in sizes]


def from_groups(
    groups: Sequence[Sequence[Mapping[str, Any]]], positions: Sequence[int], problems: Sequence[Problem]
) -> list[Rollout]:
    """The rollouts of the groups at these positions, as answers to these problems."""
    return [
        from_record(record, problem)
        for position, problem in zip(positions, problems, strict=True)
        for record in groups[position]
    ]


def answer_record(rollout: Rollout) -> dict[str, Any]:
    """The facts of one answer as plain values."""
    return {
        "uid": rollout.problem.uid,
        "messages": [dict(message) for message in rollout.problem.messages],
        "reference": rollout.problem.answer,
        "response": rollout.text,
        "reward": None if math.isnan(rollout.reward) else rollout.reward,  # JSON has no NaN
        "finished": rollout.finished,
        "num_tokens": len(rollout.response_ids),
        "seed": rollout.seed,
    }


def token_record(rollout: Rollout) -> dict[str, Any]:
    """The tokens of one answer as plain values."""
    is_known = not rollout.log_probs.isnan().any()
    return {
        "prompt_ids": rollout.prompt_ids.tolist(),
        "response_ids": rollout.response_ids.tolist(),
        "log_probs": shortest_decimals(rollout.log_probs) if is_known else None,
        "student_wrote": None if rollout.student_wrote is None else rollout.student_wrote.tolist(),
    }


def shortest_decimals(values: Tensor) -> list[float]:
    """Numbers [n] in the fewest digits that give the same float32 again."""
    return [float(str(value)) for value in values.to(torch.float32).numpy()]
