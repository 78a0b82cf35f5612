"""Rollouts as plain values and tensors, for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opd_lightning.interfaces import Problem, Rollout


def to_record(rollout: Rollout) -> dict[str, Any]:
    """All of a rollout but its problem and its reward."""
    return {
        "prompt_ids": rollout.prompt_ids.to(torch.int32),
        "seed": rollout.seed,
        "response_ids": rollout.response_ids.to(torch.int32),
        "log_probs": rollout.log_probs,
        "finished": rollout.finished,
        "text": rollout.text,
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
        student_wrote=record["student_wrote"],
    )
