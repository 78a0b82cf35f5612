"""Generation one step ahead: the next step's prompts are answered while this step trains.

Off-policy by one step, and only when asked for (`data.generate_ahead`). Knows engines and rollouts, not Lightning.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from opd_lightning.distributed import gather_objects, world_size
from opd_lightning.interfaces import (
    Listener,
    Prompt,
    PromptBatch,
    Rollout,
    RolloutEngine,
    Sampling,
    Student,
    WeightsLost,
)
from opd_lightning.rollouts.prompt_stream import join_shares


@dataclass(frozen=True)
class Generation:
    """The rollouts of one step, not graded yet.

    Attributes:
        step: Step of the prompt stream.
        rollouts: `num_samples` per prompt, in order.
        sampling: How they were sampled.
        weight_version: Version of the weights that made them.
        staleness: Steps that will have been trained between these weights and the step: 0 or 1.
        seconds: Wall-clock seconds of "generate".
    """

    step: int
    rollouts: list[Rollout]
    sampling: Sampling
    weight_version: int
    staleness: int
    seconds: dict[str, float]


def generate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    prefetch: Callable[[Rollout, int], None],
    *,
    step: int,
    staleness: int = 0,
) -> Generation:
    """Answer the prompts of a step with the weights that the engine has; `prefetch` hears of rollout and step."""
    started, version = time.perf_counter(), engine.weight_version
    with torch.no_grad():
        rollouts = engine.generate(prompts, sampling, lambda rollout: prefetch(rollout, step))
    return Generation(step, rollouts, sampling, version, staleness, {"generate": time.perf_counter() - started})


class AheadEngine(RolloutEngine):
    """An engine with at most one generation under way in a thread of its own.

    Everybody else uses it like any other: whoever syncs waits for that generation first, so that its weights are never
    exchanged under it. Rollouts are kept until their step is committed, because a checkpoint written before must
    contain them: the weights that made them are gone.

    Args:
        engine: Who generates; it must have its own copy of the weights.

    Raises:
        ValueError: It generates with the live student.
    """

    generates_apart = True

    def __init__(self, engine: RolloutEngine) -> None:
        if not engine.generates_apart:
            raise ValueError(
                f"data.generate_ahead: this {type(engine).__name__} shares weights or random state with the training"
                " that would go on meanwhile. Use VLLMServerEngine, or VLLMColocatedEngine with devices or"
                " own_process: true."
            )
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="opd-lightning-ahead")
        self._future: Future[Generation] | None = None
        self._taken: Generation | None = None
        self._saved: Mapping[str, Any] | None = None
        self._error: BaseException | None = None  # of the generation asked for last

    def setup(self, student: Student, device: torch.device) -> None:
        """Set the engine up."""
        self.engine.setup(student, device)

    def sync(self, model: nn.Module, weight_version: int) -> None:
        """Wait for what is under way, then hand over the weights."""
        self._wait()
        self.engine.sync(model, weight_version)
        self.weight_version = self.engine.weight_version

    def invalidate(self) -> None:
        """Wait for what is under way; the next `sync` takes the weights over in any case."""
        self._wait()
        self.engine.invalidate()
        self.weight_version = self.engine.weight_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        """Generate now."""
        return self.engine.generate(prompts, sampling, on_rollout)

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, prefetch: Callable[[Rollout, int], None], *, step: int
    ) -> None:
        """Begin to answer the prompts of the next step with the weights last synced."""
        assert self._future is None, "one generation at a time"
        self._future = self._thread.submit(generate, self.engine, prompts, sampling, prefetch, step=step, staleness=1)

    def take(self, batch: PromptBatch, prompts: Sequence[Prompt], sampling: Sampling) -> Generation | None:
        """This step's rollouts, once they are complete; None where they are to be generated now (then `keep` them).

        Args:
            batch: The step.
            prompts: Its prompts, as they were given to `start`.
            sampling: How they are sampled.

        Raises:
            WeightsLost: The engine has lost its weights meanwhile, and other processes may have what this one lacks.
        """
        started = time.perf_counter()
        self._wait()  # interrupted here, it stays
        future, self._future = self._future, None
        saved, self._saved = self._saved, None
        self._error = None if future is None else future.exception()
        if self._taken is not None and self._taken.step == batch.step:  # the step failed and is done again
            return self._taken
        try:
            if saved is not None and saved["step"] == batch.step:
                generation = _restore(saved, batch.positions, prompts, sampling)
            elif future is not None:
                generation = future.result()
            else:
                return None
        except WeightsLost as error:
            if world_size() > 1:
                raise
            warnings.warn(f"{error} This step's rollouts are generated anew, on-policy.", stacklevel=2)
            return None
        assert generation.step == batch.step
        waited = {"wait": time.perf_counter() - started}
        self._taken = replace(generation, seconds=generation.seconds | waited)
        return self._taken

    def keep(self, generation: Generation) -> None:
        """Remember rollouts that were generated when their step began."""
        self._taken = generation

    def commit(self) -> None:
        """The step whose rollouts were taken last has been trained."""
        self._taken = None

    def state_dict(self, num_samples: int) -> dict[str, Any]:
        """The rollouts of the first step that is not committed, of all processes; waits for them.

        Empty where there are none. Where they failed, it is said: a resumed run then generates that step's anew.

        Args:
            num_samples: Rollouts per prompt.
        """
        generation, error = self._taken, self._error
        if generation is None and self._future is not None:
            error = self._future.exception()
            generation = self._future.result() if error is None else None
        if generation is None and error is not None:
            warnings.warn(
                f"The rollouts of the next step were not generated ({error}), so they are not in this checkpoint: a"
                " resumed run generates them with the weights it has, one step newer than this run would have used.",
                stacklevel=2,
            )
        shares = gather_objects(None if generation is None else _groups(generation, num_samples))
        if generation is None or any(share is None for share in shares):
            return {}
        return {
            "step": generation.step,
            "weight_version": generation.weight_version,
            "staleness": generation.staleness,
            "seconds": generation.seconds,
            "sampling": asdict(generation.sampling),
            "groups": join_shares([share for share in shares if share is not None]),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Forget what was generated and restore `state_dict`; `take` finds the rollouts by their step."""
        self._wait()
        self._future = self._taken = self._error = None
        self._saved = state or None

    def interrupt(self) -> None:
        """Call off what is under way, as far as the engine can."""
        self.engine.interrupt()

    @property
    def context_length(self) -> int | None:
        """Of the engine."""
        return self.engine.context_length

    def close(self) -> None:
        """Wait for what is under way, which a checkpoint may still be written with, and close the engine."""
        self._wait()
        self.engine.close()
        self.weight_version = -1

    def _wait(self) -> None:
        if self._future is not None:
            wait([self._future])


def _groups(generation: Generation, num_samples: int) -> list[list[dict[str, Any]]]:
    """What `_restore` cannot find out by itself, one group per prompt, as plain values and tensors."""
    samples = [
        {
            "prompt_ids": rollout.prompt_ids.to(torch.int32),
            "seed": rollout.seed,
            "response_ids": rollout.response_ids.to(torch.int32),
            "log_probs": rollout.log_probs,
            "finished": rollout.finished,
            "text": rollout.text,
        }
        for rollout in generation.rollouts
    ]
    return [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]


def _restore(
    state: Mapping[str, Any], positions: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling
) -> Generation:
    """The saved generation of these prompts, which have these positions in their step.

    Raises:
        WeightsLost: It answers other prompts, or was sampled in another way.
    """
    groups = [state["groups"][position] for position in positions]
    asked = [(list(prompt.token_ids), seed) for prompt in prompts for seed in prompt.seeds]
    answered = [(sample["prompt_ids"].tolist(), sample["seed"]) for group in groups for sample in group]
    if asked != answered or state["sampling"] != asdict(sampling):
        raise WeightsLost(
            "The checkpoint holds the next step's rollouts for other prompts or another data.sampling, and not the"
            " weights that made them."
        )
    rollouts = [
        Rollout(
            problem=prompt.problem,
            prompt_ids=sample["prompt_ids"].to(torch.int64),
            response_ids=sample["response_ids"].to(torch.int64),
            log_probs=sample["log_probs"],
            finished=sample["finished"],
            seed=sample["seed"],
            text=sample["text"],
        )
        for prompt, group in zip(prompts, groups, strict=True)
        for sample in group
    ]
    return Generation(
        state["step"], rollouts, sampling, state["weight_version"], state["staleness"], dict(state["seconds"])
    )
