"""`OneStepAhead`: the next step's prompts are answered while this step trains. Off-policy by one step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any

from typing_extensions import override

from opd_lightning.distributed import gather_objects, world_size
from opd_lightning.interfaces import (
    LiveStudent,
    RolloutBatch,
    RolloutEngine,
    RolloutSource,
    Sampling,
    StepFacts,
    StepPrompts,
    WeightsLost,
)
from opd_lightning.rollouts.on_policy import OnPolicy, generate
from opd_lightning.rollouts.prompt_stream import join_shares
from opd_lightning.rollouts.records import from_groups, to_groups


class OneStepAhead(RolloutSource):
    """At most one generation is under way, in a thread of its own, with the weights from before the step that trains.

    Rollouts are kept until their step is trained, because a checkpoint written before must contain them: the weights
    that made them are gone. Needs an engine with its own copy of the weights (docs/vllm.md).
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="opd-lightning-ahead")
        self._coming: tuple[StepPrompts, Future[RolloutBatch]] | None = None  # under way or done, not asked for yet
        self._taken: tuple[StepPrompts, RolloutBatch] | None = None  # asked for, its step not trained yet
        self._saved: Mapping[str, Any] | None = None
        self._error: BaseException | None = None  # of the generation asked for last

    @property
    @override
    def staleness(self) -> int:
        return 1

    @override
    def setup(self, engine: RolloutEngine) -> None:
        if not engine.generates_apart:
            raise ValueError(
                f"data.source: OneStepAhead needs an engine apart from the training, but this {type(engine).__name__}"
                " shares weights or random state with it. Use VLLMServerEngine, or VLLMColocatedEngine with devices or"
                " own_process: true."
            )
        super().setup(engine)

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        """This step's rollouts, once they are complete; generated now where nobody began with them.

        Raises:
            WeightsLost: The engine has lost its weights meanwhile, and other processes may have what this one lacks.
        """
        batch = self._take(step, sampling)
        if batch is None:
            now = OnPolicy()
            now.setup(self.engine)
            batch = now.rollouts(step, sampling, student)
        self._taken = step, batch
        return batch

    @override
    def prepare(self, draw: Callable[[], StepPrompts], sampling: Sampling, student: LiveStudent) -> dict[str, float]:
        assert self._coming is None, "one generation at a time"
        following = draw()
        started = time.perf_counter()
        self.engine.sync(student.model, student.weight_version)
        seconds = {"sync": time.perf_counter() - started}
        future = self._thread.submit(generate, self.engine, following, sampling, student.announce, staleness=1)
        self._coming = following, future
        return seconds

    @override
    def observe(self, facts: StepFacts) -> None:
        self._taken = None

    @override
    def wait(self) -> None:
        if self._coming is not None:
            wait([self._coming[1]])

    @override
    def state_dict(self) -> dict[str, Any]:
        """The rollouts of the first step that is not trained, of all processes; waits for them.

        Empty where there are none. Where they failed, it is said: a resumed run then generates that step's anew.
        """
        if self._saved is not None:  # a resumed run stops before its first step
            return dict(self._saved)
        untrained, error = self._taken, self._error
        if untrained is None and self._coming is not None:
            step, future = self._coming
            self.wait()
            error = future.exception()
            untrained = (step, future.result()) if error is None else None
        if untrained is None and error is not None:
            warnings.warn(
                f"The rollouts of the next step were not generated ({error}), so they are not in this checkpoint: a"
                " resumed run generates them with the weights it has, one step newer than this run would have used.",
                stacklevel=2,
            )
        mine = None
        if untrained is not None:
            mine = to_groups(untrained[1].rollouts, [len(prompt.seeds) for prompt in untrained[0].prompts])
        shares = gather_objects(mine)
        if untrained is None or any(share is None for share in shares):
            return {}
        batch = untrained[1]
        return {
            "step": batch.step,
            "weight_version": batch.weight_version,
            "staleness": batch.staleness,
            "seconds": batch.seconds,
            "sampling": asdict(batch.sampling),
            "groups": join_shares([share for share in shares if share is not None]),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.wait()
        self._coming = self._taken = self._error = None
        self._saved = state or None

    @override
    def close(self) -> None:
        """Wait for what is under way, which a checkpoint may still be written with."""
        self.wait()

    def _take(self, step: StepPrompts, sampling: Sampling) -> RolloutBatch | None:
        started = time.perf_counter()
        self.wait()  # interrupted here, it stays
        coming, self._coming = self._coming, None
        saved, self._saved = self._saved, None
        self._error = None if coming is None else coming[1].exception()
        if self._taken is not None and self._taken[0].step == step.step:  # the step failed and is done again
            return self._taken[1]
        try:
            if saved is not None and saved["step"] == step.step:
                batch = _restore(saved, step, sampling)
            elif coming is not None:
                batch = coming[1].result()
            else:
                return None
        except WeightsLost as error:
            if world_size() > 1:
                raise
            warnings.warn(f"{error} This step's rollouts are generated anew, on-policy.", stacklevel=2)
            return None
        assert batch.step == step.step
        return replace(batch, seconds=batch.seconds | {"wait": time.perf_counter() - started})


def _restore(state: Mapping[str, Any], step: StepPrompts, sampling: Sampling) -> RolloutBatch:
    """The saved rollouts of these prompts.

    Raises:
        WeightsLost: They answer other prompts, or were sampled in another way.
    """
    rollouts = from_groups(state["groups"], step.positions, [prompt.problem for prompt in step.prompts])
    asked = [(list(prompt.token_ids), seed) for prompt in step.prompts for seed in prompt.seeds]
    answered = [(rollout.prompt_ids.tolist(), rollout.seed) for rollout in rollouts]
    if asked != answered or state["sampling"] != asdict(sampling):
        raise WeightsLost(
            "The checkpoint holds the next step's rollouts for other prompts or another data.sampling, and not the"
            " weights that made them."
        )
    return RolloutBatch(
        rollouts, state["weight_version"], state["step"], sampling, dict(state["seconds"]), state["staleness"]
    )
