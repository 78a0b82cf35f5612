"""The seams of generation: who answers prompts with the student's weights, and where a step's rollouts come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opd_lightning.interfaces.models import Student, Teacher, Tokenizer
from opd_lightning.interfaces.words import (
    Listener,
    Problem,
    Prompt,
    PromptBatch,
    Rollout,
    RolloutBatch,
    Sampling,
    StepPrompts,
)


class LiveStudent(Protocol):
    """The student in training, as engines and rollout sources see it."""

    spec: Student
    teacher: Teacher | None
    weight_version: int

    @property
    def model(self) -> nn.Module:
        """The loaded model, whose weights change from step to step."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that training runs in."""

    def announce(self, rollout: Rollout, step: int) -> None:
        """Hear of a rollout of this step as soon as it exists, from any thread (a teacher may begin to score it)."""


class WeightsLost(ConnectionError):
    """An engine no longer has the weights it was given, and cannot be given them again from where it is asked."""


@dataclass(frozen=True)
class Blend:
    """Another model that has a say in every token that is drawn.

    Attributes:
        student: How to run it.
        model: Loaded, on the student's device.
        share: Its share of the distribution that is drawn from, in (0, 1]; the rest is the student's.
    """

    student: Student
    model: nn.Module
    share: float


class RolloutEngine(ABC):
    """Generates responses with the student's current weights."""

    weight_version: int = -1  # version of the weights last synced; -1 before the first sync
    generates_apart: bool = False  # whether `generate` may run in a thread while the student's weights change
    blends: bool = False  # whether it can draw from two models at once (`blended`)

    def preflight(self, student: Student) -> None:  # noqa: B027 - not every engine has something to check
        """Check what can be known before any weight is loaded; `context_length` is known afterwards.

        Raises:
            ValueError: This engine cannot generate for this student.
        """

    @abstractmethod
    def setup(self, student: Student, device: torch.device) -> None:
        """Prepare for this student; called once, before the first `sync`."""

    @abstractmethod
    def sync(self, model: nn.Module, weight_version: int) -> None:
        """Take over the student's current weights and remember their version."""

    @property
    def context_length(self) -> int | None:
        """Most tokens (prompt + response) it takes, where that may be less than the student's; None when unknown."""
        return None

    def knows_log_probs(self, sampling: Sampling) -> bool:
        """Whether rollouts sampled so carry their log-probabilities before any cut (else NaN)."""
        return True

    def interrupt(self) -> None:  # noqa: B027 - most are never asked
        """Call off what another thread is generating, as far as possible; the run is over."""

    def invalidate(self) -> None:
        """Make the next `sync` take the weights over even if their version is the one it knows."""
        self.weight_version = -1

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        """One rollout per seed of every prompt, in order.

        Leaves the global random state and the model's mode unchanged. Tells `on_rollout` of each rollout as it is
        finished, from any thread, if it can.
        """

    def blended(self, blend: Blend) -> AbstractContextManager[None]:
        """Inside, each token is drawn from the tempered distributions of both models, mixed by their shares.

        Log-probabilities of rollouts are those of the mixture; the extra `student_log_prob` has the student's own.
        """
        raise AssertionError("asked only where `blends`")

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what `setup` took."""


@dataclass(frozen=True)
class TrainedRollout:
    """One rollout after its step.

    Attributes:
        rollout: With its reward.
        losses: float32 [N] on the CPU, nats: loss of each token that the student wrote.
        facts: float32 [N] each, on the CPU: what the metrics say about these tokens, by name (docs/metrics.md); NaN
            where a fact is not defined.
    """

    rollout: Rollout
    losses: Tensor
    facts: Mapping[str, Tensor]


@dataclass(frozen=True)
class StepFacts:
    """What training a step told, on this process.

    Attributes:
        step: Step of the prompt stream.
        rollouts: In the order in which they were trained.
    """

    step: int
    rollouts: tuple[TrainedRollout, ...]


class RolloutSource(ABC):
    """Decides where the rollouts of a step come from, how they are sampled, and with which weights.

    The data module calls `setup` once; for each step `rollouts`, then, when they are graded and the prompt selector has
    seen the rewards, `share` and `prepare`; and after training `observe`. A source may ask for several steps' prompts
    at once (`num_steps_wanted`) and hand their rollouts out step by step. Everything that a later step reads must be in
    `state_dict`, which describes the moment after the last `observe`.

    Attributes:
        needs_marks: Whether `share` reads the marks that the task gives: a run in which an answer may have none is
            refused.
    """

    engine: RolloutEngine
    needs_marks: bool = False

    def setup(self, engine: RolloutEngine) -> None:
        """Take the engine; called once, before any weight is loaded.

        Raises:
            ValueError: This source needs another kind of engine.
        """
        self.engine = engine

    def check_teacher(self, teacher: Teacher | None, is_cut_up: bool) -> None:  # noqa: B027 - most ask it nothing
        """Look at the teacher's settings, before any weight is loaded.

        Args:
            teacher: Not loaded yet.
            is_cut_up: Whether the student's weights are cut up over processes (`FSDP2Strategy`).

        Raises:
            ValueError: This source needs another one.
        """

    def admit(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, sampling: Sampling, num_rollouts: int
    ) -> list[Problem]:
        """The training problems that rollouts can be had for (default: all of them); called after `setup`.

        Args:
            problems: Those of the task.
            tokenizer: The student's.
            sampling: How the run samples.
            num_rollouts: Rollouts wanted of each.

        Raises:
            ValueError: There are too few; the message says what to do.
        """
        return list(problems)

    @abstractmethod
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        """The rollouts of a step, not graded: one per seed of every prompt, in order.

        Args:
            step: What is asked.
            sampling: How the run samples; a source may ask for shorter responses.
            student: For its weights, their version and its tokenizer.
        """

    @property
    def num_steps_wanted(self) -> int:
        """Steps whose prompts the coming step asks for: 1 by default, 0 where it trains rollouts that are there.

        A function of what `state_dict` says, the same on all processes.
        """
        return 1

    def share(self, asked: PromptBatch, graded: RolloutBatch | None, seed: int) -> RolloutBatch:
        """What this step trains (default: all that was generated for it).

        Args:
            asked: The problems that were asked last, in this step or before.
            graded: Their rollouts; None in a step that asked for none.
            seed: Of the run.
        """
        assert graded is not None, "a source that skips prompts must hand out rollouts"
        return graded

    def prepare(self, draw: Callable[[], StepPrompts], sampling: Sampling, student: LiveStudent) -> dict[str, float]:
        """Get ready for the next step while this one trains (default: do nothing).

        Args:
            draw: Chooses and renders the next step's prompts now.
            sampling: How the run samples.
            student: Its weights are those before the step that trains.

        Returns:
            Wall-clock seconds by part.
        """
        return {}

    def observe(self, facts: StepFacts) -> None:  # noqa: B027 - most do not learn
        """A step has been trained: learn from it, and let go of its rollouts."""

    def observe_search(self, factor: float) -> None:  # noqa: B027 - most do not care
        """A search since the last step has moved the weights by this multiple of their recent change.

        Args:
            factor: Negative where it went back, 0 where nothing moved; the same on all processes.
        """

    def wait(self) -> None:  # noqa: B027 - most do nothing in the background
        """Return when the engine is idle, so that others may use it."""

    def knows_log_probs(self, sampling: Sampling) -> bool:
        """Whether rollouts will carry the log-probabilities they were drawn with."""
        return self.engine.knows_log_probs(sampling)

    @property
    def staleness(self) -> int | None:
        """Steps between the weights that generate and those that train: 0 is on-policy, None is not known."""
        return 0

    @property
    def asks_engine(self) -> bool:
        """Whether an engine answers, at least in part: so it is unless others wrote all (default: `staleness` says)."""
        return self.staleness is not None

    def state_dict(self) -> dict[str, Any]:
        """Every value a later step reads: plain numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """Restore `state_dict`; an empty one starts over."""

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what `setup` took; the engine is closed by its owner."""
