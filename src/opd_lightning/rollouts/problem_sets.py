"""Which problems of a task a run works on: read, checked, cut to what fits, drawn for scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_lightning.interfaces import Problem, Sampling, Split, Task, Tokenizer
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.answering import resolve_stop_ids
from opd_lightning.rollouts.prompt_limits import keep_fitting
from opd_lightning.rollouts.task_checks import check_problems


def read_problems(
    task: Task,
    split: Split,
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    setting: str,
    context: int,
    max_prompt_tokens: int | None,
    drop: bool,
) -> tuple[list[Problem], int]:
    """Problems of a split whose prompts leave room for a whole response, and the length of the longest prompt.

    Args:
        task: Whose problems.
        split: Which of them.
        tokenizer: Renders the prompts.
        sampling: Says how long a response may get, and what closes it.
        setting: Name of the sampling settings, for messages.
        context: Most tokens (prompt + response) that student and engine take.
        max_prompt_tokens: Longest prompt; None is what the context leaves.
        drop: Leave long ones out with a warning instead of refusing.

    Raises:
        ValueError: There are none, they are not what a task must give, some are too long, or a stop id is no token.
    """
    problems = check_problems(task, split)
    resolve_stop_ids(tokenizer, sampling)
    return keep_fitting(
        problems,
        [len(tokenizer.render(problem.messages)) for problem in problems],
        split=split,
        setting=setting,
        context=context,
        max_new_tokens=sampling.max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        drop=drop,
    )


def describe_problems(problems: Sequence[Problem]) -> str:
    """How many, and a digest of what they ask in which order: another data set of the same size is noticed."""
    digest = derive_seed(*(part for problem in problems for part in (problem.uid, repr(problem.messages))))
    return f"{len(problems)} problems with digest {digest:016x}"


def draw_problems(problems: Sequence[Problem], num_problems: int, seed: int) -> list[Problem]:
    """Some problems, in an order that is a function of the seed: fewer are the first of more.

    Raises:
        ValueError: There are not so many.
    """
    if num_problems > len(problems):
        raise ValueError(
            f"EffOPD score: {num_problems} prompts were asked for, but there are {len(problems)} training problems."
            " Lower num_prompts (or data.num_reserved)."
        )
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed))
    return [problems[i] for i in order[:num_problems].tolist()]


def without_reserved(problems: Sequence[Problem], reserved: Sequence[Problem]) -> list[Problem]:
    """The problems that are left for training.

    Raises:
        ValueError: None is.
    """
    uids = {problem.uid for problem in reserved}
    left = [problem for problem in problems if problem.uid not in uids]
    if not left:
        raise ValueError(
            f"data.num_reserved={len(reserved)} leaves none of the {len(problems)} training problems. Lower it."
        )
    return left
