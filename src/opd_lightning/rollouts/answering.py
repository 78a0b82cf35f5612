"""From problems to prompts, and from rollouts to marks; `answer` does both around an engine, for held-out problems.

Does not know Lightning; the caller syncs the engine's weights and enters autocast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd_lightning.interfaces import (
    Problem,
    Prompt,
    PromptOutcome,
    Rollout,
    RolloutBatch,
    RolloutEngine,
    Sampling,
    Task,
    Tokenizer,
)
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.task_checks import check_grades


@dataclass(frozen=True)
class Answers:
    """Graded rollouts, those of a problem next to each other.

    Attributes:
        rollouts: `num_samples` rollouts per problem, in the order of the problems.
        num_samples: Rollouts per problem.
        seconds: Wall-clock seconds of "generate" and "grade".
    """

    rollouts: list[Rollout]
    num_samples: int
    seconds: dict[str, float]

    def by_problem(self) -> list[list[Rollout]]:
        """The rollouts grouped by problem."""
        return [self.rollouts[i : i + self.num_samples] for i in range(0, len(self.rollouts), self.num_samples)]


def render_prompts(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    positions: Sequence[int],
    *,
    num_samples: int,
    seed_parts: Sequence[int | str],
) -> list[Prompt]:
    """Render problems and give each sample its own seed.

    Args:
        tokenizer: Renders the chat messages.
        problems: What to ask.
        positions: Global position of each problem in its step or split; with it, and not with the rank, a seed is made.
        num_samples: Rollouts per problem.
        seed_parts: What else the seeds depend on: (seed, purpose, step).
    """
    return [
        Prompt(
            problem=problem,
            token_ids=tuple(tokenizer.render(problem.messages)),
            seeds=tuple(derive_seed(*seed_parts, position, sample) for sample in range(num_samples)),
        )
        for problem, position in zip(problems, positions, strict=True)
    ]


def grade(task: Task, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same rollouts with their rewards; they stay NaN where the task cannot mark.

    Raises:
        ValueError: What the task gave are not grades.
    """
    marked = list(rollouts)
    places = [i for i, rollout in enumerate(rollouts) if task.can_grade(rollout.problem)]
    if places:
        own = [rollouts[i] for i in places]
        for i, reward in zip(places, check_grades(task, own, task.grade_rollouts(own)), strict=True):
            marked[i] = rollouts[i].graded(reward)
    return marked


def grade_step(
    task: Task | None, found: RolloutBatch, indices: Sequence[int], num_samples: int
) -> tuple[RolloutBatch, list[PromptOutcome]]:
    """The step's rollouts with their rewards, and what became of each prompt.

    Args:
        task: Marks; None leaves the rewards NaN.
        found: Not graded, `num_samples` rollouts per prompt.
        indices: Of the prompts' problems.
        num_samples: Rollouts per prompt.
    """
    started = time.perf_counter()
    rollouts = found.rollouts if task is None else grade(task, found.rollouts)
    seconds = found.seconds | {"grade": time.perf_counter() - started}
    groups = Answers(rollouts, num_samples, seconds).by_problem()
    rewards = [tuple(rollout.reward for rollout in group) for group in groups]
    outcomes = [PromptOutcome(*pair) for pair in zip(indices, rewards, strict=True)]
    return replace(found, rollouts=rollouts, seconds=seconds), outcomes


def resolve_stop_ids(tokenizer: Tokenizer, sampling: Sampling) -> list[int]:
    """The ids that close a response: those of the sampling, else the student's own.

    Raises:
        ValueError: One is no token of the student's, or neither of them says what closes a response.
    """
    if sampling.stop_ids is None and not tokenizer.stop_ids:
        raise ValueError(
            "sampling.stop_ids: the student's tokenizer names no token that closes a response. Give token ids, or []"
            " to let only max_new_tokens end one (Hugging Face students can also name it: student.extra_stop_tokens)."
        )
    stop_ids = list(tokenizer.stop_ids if sampling.stop_ids is None else sampling.stop_ids)
    if unknown := [token_id for token_id in stop_ids if not 0 <= token_id < tokenizer.vocab_size]:
        raise ValueError(f"sampling.stop_ids: expected token ids from 0 to {tokenizer.vocab_size - 1}, got {unknown}.")
    return stop_ids


def closed_text(tokenizer: Tokenizer, response_ids: Sequence[int], finished: bool) -> str:
    """What was generated, decoded with all its special tokens; only the token that closed it is cut."""
    return tokenizer.decode(response_ids[:-1] if finished else response_ids, skip_special_tokens=False)


def check_rollouts(batch: RolloutBatch, num_expected: int, source: str) -> None:
    """Refuse what a rollout source may not give.

    Args:
        batch: What it gave.
        num_expected: One rollout per seed of every prompt.
        source: Name of its class.

    Raises:
        ValueError: Another number of rollouts, or log-probabilities that do not fit their tokens.
    """
    if len(batch.rollouts) != num_expected:
        raise ValueError(
            f"data.source: {source} gave {len(batch.rollouts)} rollouts in step {batch.step}; expected {num_expected},"
            " one per seed of every prompt."
        )
    for rollout in batch.rollouts:
        if not len(rollout.response_ids) == len(rollout.log_probs):
            raise ValueError(
                f"data.source: {source} gave problem {rollout.problem.uid!r} a response of {len(rollout.response_ids)}"
                f" tokens with {len(rollout.log_probs)} log-probabilities; expected one each (NaN where not known)."
            )


def answer(
    engine: RolloutEngine, task: Task, prompts: Sequence[Prompt], sampling: Sampling, *, num_samples: int
) -> Answers:
    """Generate `num_samples` responses per prompt and grade them."""
    started = time.perf_counter()
    rollouts = engine.generate(prompts, sampling)
    generated = time.perf_counter()
    graded = grade(task, rollouts)
    seconds = {"generate": generated - started, "grade": time.perf_counter() - generated}
    return Answers(rollouts=graded, num_samples=num_samples, seconds=seconds)
