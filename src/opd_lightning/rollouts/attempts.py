"""Several attempts at an answer that is worth keeping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import Prompt, Rollout
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.rejection import Rejection


@dataclass(frozen=True)
class Kept:
    """An answer that no rule rejects.

    Attributes:
        rollout: The answer.
        sample: Which of a problem's samples it is.
        attempt: At which attempt it came.
        scores: More columns of its row: what a teacher said of its tokens.
    """

    rollout: Rollout
    sample: int
    attempt: int
    scores: Mapping[str, Any] = field(default_factory=dict)


def attempt(
    ask: Callable[[Sequence[Prompt]], Sequence[Rollout]],
    prompts: Sequence[Prompt],
    reject: Rejection,
    *,
    num_attempts: int,
) -> tuple[list[list[Kept]], Counter[str]]:
    """Ask until every sample of every prompt is kept, or its attempts are used up.

    Which seeds are asked depends on the prompt's own seeds and the number of the attempt only. Processes ask together
    as often as the one that asks most, since engines may need all of them.

    Args:
        ask: Gives one graded rollout per seed of every prompt, in order.
        prompts: One seed for each sample wanted.
        reject: The rules.
        num_attempts: Most answers asked for one sample.

    Returns:
        The kept answers of each prompt by sample, and counts: "generated", "kept", "rejected: REASON".
    """
    kept: list[list[Kept]] = [[] for _ in prompts]
    waiting = [(i, sample) for i, prompt in enumerate(prompts) for sample in range(len(prompt.seeds))]
    counts: Counter[str] = Counter()
    for number in range(num_attempts):
        if not any(gather_objects(bool(waiting))):
            break
        asked: dict[int, list[int]] = {}
        for i, sample in waiting:
            asked.setdefault(i, []).append(sample)
        rollouts = ask([_prompt_of_attempt(prompts[i], samples, number) for i, samples in asked.items()])
        counts["generated"] += len(rollouts)
        failed = []
        for (i, sample), rollout in zip(waiting, rollouts, strict=True):
            reason = reject.reason(rollout, {tuple(other.rollout.response_ids.tolist()) for other in kept[i]})
            if reason is None:
                kept[i].append(Kept(rollout, sample, number))
                counts["kept"] += 1
            else:
                counts[f"rejected: {reason}"] += 1
                failed.append((i, sample))
        waiting = failed
    return [sorted(answers, key=lambda answer: answer.sample) for answers in kept], counts


def _prompt_of_attempt(prompt: Prompt, samples: Sequence[int], number: int) -> Prompt:
    seeds = [prompt.seeds[sample] for sample in samples]
    return replace(prompt, seeds=tuple(derive_seed(seed, "attempt", number) if number else seed for seed in seeds))
