"""`OnPolicy`: every step's rollouts come from the weights that they train."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from typing_extensions import override

from opd_lightning.interfaces import (
    LiveStudent,
    Rollout,
    RolloutBatch,
    RolloutEngine,
    RolloutSource,
    Sampling,
    StepPrompts,
)


class OnPolicy(RolloutSource):
    """Hands the engine the student's current weights and has it answer the step's prompts."""

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        started = time.perf_counter()
        self.engine.sync(student.model, student.weight_version)
        seconds = {"sync": time.perf_counter() - started}
        with student.autocast():
            batch = generate(self.engine, step, sampling, student.announce)
        batch.seconds |= seconds
        return batch


def generate(
    engine: RolloutEngine,
    step: StepPrompts,
    sampling: Sampling,
    announce: Callable[[Rollout, int], None],
    *,
    staleness: int = 0,
) -> RolloutBatch:
    """Answer the prompts of a step with the weights that the engine has.

    Args:
        engine: Who generates.
        step: What is asked.
        sampling: How.
        announce: Hears of each rollout and of the step as soon as it is finished, from any thread.
        staleness: Steps that will have been trained between these weights and the step.
    """
    started, version = time.perf_counter(), engine.weight_version
    with torch.no_grad():
        rollouts = engine.generate(step.prompts, sampling, lambda rollout: announce(rollout, step.step))
    seconds = {"generate": time.perf_counter() - started}
    return RolloutBatch(rollouts, version, step.step, sampling, seconds, staleness)
