"""Answer problems with an engine and mark the answers.

The one place that turns problems into prompts and graded rollouts: training, validation, test, predict and EffOPD
scores all come here. Does not know Lightning; the caller syncs the engine's weights and enters autocast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from opd_lightning.interfaces import Problem, Prompt, Rollout, RolloutEngine, Sampling, Task, Tokenizer
from opd_lightning.randomness import derive_seed


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
    """The same rollouts with their rewards."""
    rewards = task.grade_all([rollout.problem for rollout in rollouts], [rollout.text for rollout in rollouts])
    return [rollout.graded(reward) for rollout, reward in zip(rollouts, rewards, strict=True)]


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
