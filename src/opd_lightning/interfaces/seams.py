"""The seams of the project: what may be replaced, one abstract class each.

Knows nothing of Lightning, transformers or vLLM; every backend, task and selector stands behind one of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.interfaces.words import (
    Listener,
    Message,
    MicroBatch,
    Problem,
    Prompt,
    Rollout,
    Sampling,
    ScoreRequest,
    Split,
    describe_request,
)


class Tokenizer(ABC):
    """Text to token ids and back, for one model family."""

    vocab_size: int  # number of real token ids; head rows beyond it are padding
    pad_id: int
    stop_ids: tuple[int, ...]

    @abstractmethod
    def render(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template with the generation header and return token ids."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of the ids."""


class Student(ABC):
    """The model to train: how to load it, run it and save it. A plain object: Lightning sees only the loaded module."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer (loaded on first use)."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Most tokens (prompt + response) that the model accepts."""

    @abstractmethod
    def load(self) -> nn.Module:
        """Load the weights in the training dtype, with gradients on for what is to be trained."""

    @abstractmethod
    def hidden_states(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Final hidden states [N, H] at `batch.rows, batch.columns`: what the head turns into next-token logits."""

    @abstractmethod
    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Turn hidden states [N, H] into untempered float32 logits [N, V].

        V = `tokenizer.vocab_size`: padding rows of the head are cut off.
        """

    def named_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as a plain model folder has them, adapters merged out of place.

        For engines with their own copy of the weights.
        """
        yield from model.state_dict().items()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Class path and constructor arguments as plain values: enough to build the same student again."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, *, merge_adapter: bool = True) -> None:
        """Write a folder that `from_pretrained` loads (safetensors, config, tokenizer)."""


class TeacherScores(ABC):
    """Tempered teacher log-probabilities (float32, nats) for N response tokens, whatever backend they came from."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """N."""

    @abstractmethod
    def slice(self, start: int, stop: int) -> TeacherScores:
        """Scores of the response tokens start..stop-1."""

    @abstractmethod
    def sampled(self) -> Tensor:
        """[N] log-probabilities of the sampled tokens."""

    @abstractmethod
    def at(self, token_ids: Tensor) -> Tensor:
        """[N, K] log-probabilities at the given ids [N, K]."""

    @abstractmethod
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest ids [N, k] and their log-probabilities [N, k], likeliest first."""

    @abstractmethod
    def full(self) -> Tensor:
        """[N, V] log-probabilities of the whole vocabulary. Call it on slices."""


class Teacher(ABC):
    """A frozen model that scores the student's tokens. Never an `nn.Module` attribute of anything Lightning sees."""

    @property
    @abstractmethod
    def offer(self) -> ScoreRequest:
        """The most this teacher can be asked for (its temperature says nothing)."""

    @property
    def context_length(self) -> int | None:
        """Most tokens (prompt + response) it can score; None when it does not say. Known after `preflight`."""
        return None

    def check(self, request: ScoreRequest) -> None:
        """Refuse a request that goes beyond the offer.

        Raises:
            ValueError: It does; the message says what this teacher can give.
        """
        offer = self.offer
        if (
            request.top_k > offer.top_k
            or request.arbitrary_ids > offer.arbitrary_ids
            or request.full_vocabulary > offer.full_vocabulary
        ):
            raise ValueError(
                f"objective: {type(self).__name__} cannot give {describe_request(request)}; it gives"
                f" {describe_request(offer)}. Choose an objective.support that needs no more."
            )

    def preflight(self, student: Student) -> None:  # noqa: B027 - not every teacher has something to check
        """Check tokenizer and vocabulary against the student's before any weights are loaded.

        Raises:
            ValueError: Teacher and student do not speak the same token ids.
        """

    @abstractmethod
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Load the teacher once and check that it speaks the student's token ids.

        Args:
            student: The student's description (tokenizer, vocabulary).
            model: The loaded student (a LoRA student's base model may serve as the teacher).
            device: Where scoring happens.
        """

    @abstractmethod
    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        """Score the response tokens of one micro-batch."""

    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        """Score the micro-batches of one step in order; override it to load, pipeline or pre-compute."""
        for batch in batches:
            yield self.score(batch, request)

    def prefetch(self, rollout: Rollout, request: ScoreRequest, step: int) -> None:  # noqa: B027 - most cannot
        """Begin to score a rollout whose step is not complete yet; `score_all` will ask for it soon."""

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what `setup` took."""


class WeightsLost(ConnectionError):
    """An engine no longer has the weights it was given, and cannot be given them again from where it is asked."""


class RolloutEngine(ABC):
    """Generates responses with the student's current weights."""

    weight_version: int = -1  # version of the weights last synced; -1 before the first sync
    generates_apart: bool = False  # whether `generate` may run in a thread while the student's weights change

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

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what `setup` took."""


@dataclass(frozen=True)
class PromptOutcome:
    """What became of one prompt of a step: its index in the training problems and the rewards of its rollouts."""

    index: int
    rewards: tuple[float, ...]


class PromptSelector(ABC):
    """Chooses which problems come next; identical on all ranks, as it draws globally and sees all outcomes."""

    @abstractmethod
    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the training problems; called once, before `load_state_dict`."""

    @abstractmethod
    def select(self, num_problems: int) -> list[int]:
        """Indices of the next problems; a function of the seed and of the saved state only."""

    def observe(self, outcomes: Iterable[PromptOutcome]) -> None:  # noqa: B027 - most do not learn
        """Learn from the rollouts of the last selection (default: ignore them)."""

    @property
    def epoch_length(self) -> int:
        """Problems in one pass, for counting epochs."""
        raise AssertionError(f"{type(self).__name__} must define epoch_length")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Every value a future `select` reads: plain numbers, strings, lists, dicts and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""

    def metrics(self) -> dict[str, float]:
        """Numbers worth logging."""
        return {}


class Task(ABC):
    """Problems, their rendering as chat messages, and the marking of answers."""

    @abstractmethod
    def problems(self, split: Split) -> list[Problem]:
        """All problems of a split, in a fixed order."""

    @abstractmethod
    def grade(self, problem: Problem, response: str) -> float:
        """Mark a response: 1 is right, 0 is wrong, in between for partial credit."""

    def grade_all(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        """Mark many responses; override it when they can be marked side by side."""
        return [self.grade(problem, response) for problem, response in zip(problems, responses, strict=True)]


class Score(ABC):
    """What EffOPD maximises."""

    @abstractmethod
    def __call__(self, trainer: Any, module: Any) -> float:
        """Return the score of the current weights, higher is better, the same on all ranks."""
