"""Rollouts written by hand."""

import math

import torch

from opd_lightning.interfaces import Problem, Rollout, TrainedRollout

PROBLEM = Problem("u", ({"role": "user", "content": "say a"},), "a")


def make_rollout(ids, reward=math.nan, finished=True, problem=PROBLEM, seed=0, prompt=(7, 8)):
    return Rollout(
        problem, torch.tensor(prompt), torch.tensor(ids), torch.zeros(len(ids)), finished, seed, reward=reward
    )


def compared(ids, reward=math.nan, **facts):
    values = {name: torch.tensor(each, dtype=torch.float32) for name, each in facts.items()}
    return TrainedRollout(make_rollout(ids, reward), torch.zeros(len(ids)), values)
