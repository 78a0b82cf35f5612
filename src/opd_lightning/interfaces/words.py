"""The words of the project: the data that travels through one step.

`Problem` -> `Prompt` -> `Rollout` -> `RolloutBatch`; what the models see of them is in `tokens.py`. Knows nothing of
Lightning, transformers or vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Split = Literal["train", "validation", "test", "predict"]
Message = Mapping[str, str]


@dataclass(frozen=True)
class Problem:
    """One question, with its reference answer if it has one.

    Attributes:
        uid: Stable name of the problem, unique in its split (for example ``"gsm8k/train/17"``).
        messages: Chat messages (``{"role": ..., "content": ...}``) as the student will see them, before the template.
            A single message with the role ``"raw"`` is the prompt itself, without any template.
        answer: Reference answer in the form the task's `grade` understands; None for problems without one.
        source: Name of the data source, used by mixtures and by per-source metrics.
        columns: Remaining columns of the row, for filters (level, language, ...).
    """

    uid: str
    messages: tuple[Message, ...]
    answer: str | None = None
    source: str = "default"
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: Most response tokens, the closing token included.
        temperature: Divides the logits; 0 means greedy decoding.
        top_p: Nucleus mass in (0, 1]; 1 keeps the whole distribution.
        top_k: Keep only the k likeliest tokens; 0 keeps all.
        stop_ids: Token ids that close a response; None takes the student's own list (generation config and tokenizer),
            and an empty list means that only `max_new_tokens` ends one.

    Raises:
        ValueError: A value is outside its range.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens: expected an integer of at least 1, got {self.max_new_tokens}.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"sampling.temperature: expected a finite number of at least 0 (0 is greedy), got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: expected a number in (0, 1] (1 switches the cut off), got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k: expected 0 (no cut) or a positive integer, got {self.top_k}.")

    @property
    def is_whole_distribution(self) -> bool:
        """Whether every token of the tempered distribution can be drawn (no greedy, top-p or top-k cut)."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Prompt:
    """A problem rendered to token ids, with one seed for each rollout wanted.

    Attributes:
        problem: What is asked.
        token_ids: The rendered prompt, generation header included.
        seeds: One non-negative 63-bit seed per rollout; a rollout is a function of weights,
            token_ids, sampling and seed.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One response. Token ids are the truth; `text` is for graders and people only.

    A response may have several turns: then `student_wrote` says which of its tokens are the student's own. Only those
    are scored and trained on; the others (a tool's answer, say) are read like the prompt.

    Attributes:
        problem: What was asked.
        prompt_ids: int64 [P] on the CPU.
        response_ids: int64 [T] on the CPU, the closing token included when there is one.
        log_probs: float32 [T] on the CPU, nats: log-probability of each sampled token under the student's tempered
            distribution over its whole vocabulary (before any top-p or top-k cut); NaN where it is not known.
        finished: True when a stop id closed the response, False when it was cut at `max_new_tokens`.
        seed: The seed it was drawn with.
        text: What was generated, decoded, without the token that closed it.
        reward: Grade in [0, 1]; NaN until the task has graded it, and where it never does.
        student_wrote: bool [T] on the CPU; None when the student wrote every token.
        extras: Values of single tokens, float32 [T] on the CPU, that an objective's `shape` has attached by name.
        context: Texts that a teacher's `shape` has attached by name: what the teacher reads beside the problem.
    """

    problem: Problem
    prompt_ids: Tensor
    response_ids: Tensor
    log_probs: Tensor
    finished: bool
    seed: int
    text: str = ""
    reward: float = math.nan
    student_wrote: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained_positions(self) -> Tensor:
        """int64 [N]: positions in the response of the tokens that the student wrote."""
        if self.student_wrote is None:
            return torch.arange(len(self.response_ids))
        return self.student_wrote.nonzero().squeeze(-1)

    @property
    def num_trained(self) -> int:
        """N, the number of tokens that the student wrote."""
        return len(self.response_ids) if self.student_wrote is None else int(self.student_wrote.sum())

    def to(self, *args: Any, **kwargs: Any) -> Rollout:
        """Nothing to move: rollouts live on the CPU."""
        return self

    def graded(self, reward: float) -> Rollout:
        """Return the same rollout with its grade."""
        return replace(self, reward=reward)


Listener = Callable[[Rollout], None] | None
"""Told of rollouts one by one."""


@dataclass
class PromptBatch:
    """What the prompt stream yields: the problems of one step for this process.

    Attributes:
        problems: This rank's problems.
        indices: Index of each problem in its split.
        positions: Position of each problem in the step's global list: seeds depend on it, so that the number of
            processes does not change any sample.
        step: How many batches the stream had yielded before this one.
        is_new: Whether they are to be answered now; False where the rollout source holds their rollouts already.
    """

    problems: list[Problem]
    indices: list[int]
    positions: list[int]
    step: int
    is_new: bool = True

    def to(self, *args: Any, **kwargs: Any) -> PromptBatch:
        """Nothing to move: the text stays on the CPU."""
        return self


@dataclass(frozen=True)
class StepPrompts:
    """The rendered prompts of one step on this process.

    Attributes:
        step: Step of the prompt stream.
        positions: Position of each prompt in the step's global list.
        prompts: One entry per problem.
    """

    step: int
    positions: tuple[int, ...]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class RoundPart:
    """Which part of a round this step trains; a round is what was generated at once to be trained in several steps.

    Attributes:
        index: Rounds before it.
        pass_index: Passes over the round's rollouts before this one.
        num_passes: Passes planned.
        rollouts: All of the round on this process, in the order in which they were generated.
        max_score_bytes: Most bytes of teacher scores that may be kept for it on this process.
    """

    index: int
    pass_index: int
    num_passes: int
    rollouts: tuple[Rollout, ...]
    max_score_bytes: int


@dataclass
class RolloutBatch:
    """The graded rollouts of one step on this process.

    Attributes:
        rollouts: One entry per rollout, the rollouts of a prompt next to each other.
        weight_version: Version of the student's weights that generated them.
        step: Step of the prompt stream.
        sampling: How they were sampled.
        seconds: Wall-clock seconds of each part ("sync", "generate", "grade"; "wait" for a generation under way).
        staleness: Steps trained since the weights that generated them: 0 on-policy, 1 when generated one step ahead;
            None where others than the student wrote them, or nobody knows.
        round: The round they are a part of; None where the step trains all that was generated.
    """

    rollouts: list[Rollout]
    weight_version: int
    step: int
    sampling: Sampling
    seconds: dict[str, float] = field(default_factory=dict)
    staleness: int | None = 0
    round: RoundPart | None = None

    @property
    def num_response_tokens(self) -> int:
        """Response tokens on this process."""
        return _num_tokens(self.rollouts)

    @property
    def num_generated_tokens(self) -> int:
        """Response tokens on this process that `seconds` speaks of: of the whole round, where it is a part of one."""
        return _num_tokens(self.rollouts if self.round is None else self.round.rollouts)

    def to(self, *args: Any, **kwargs: Any) -> RolloutBatch:
        """Nothing to move yet: micro-batches go to the device one at a time."""
        return self


def _num_tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.response_ids) for rollout in rollouts)
