"""Which problems leave room for a whole response."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from opd_lightning.interfaces import Problem, Prompt, Sampling


def check_room(prompts: Sequence[Prompt], sampling: Sampling, context: int) -> None:
    """Refuse prompts that are empty or leave no room for a whole response.

    Raises:
        ValueError: One is, or does not.
    """
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(
                f"problem {prompt.problem.uid!r}: the prompt is empty. Check its messages and the template."
            )
        if len(prompt.token_ids) > context - sampling.max_new_tokens:
            raise ValueError(
                f"problem {prompt.problem.uid!r}: {len(prompt.token_ids)} prompt tokens and"
                f" sampling.max_new_tokens={sampling.max_new_tokens} do not fit into the student's context of"
                f" {context} tokens. Lower max_new_tokens or leave long prompts out."
            )


def check_context(subject: str, limit: int | None, longest_prompt: int, sampling: Sampling) -> None:
    """Refuse rollouts that may become longer than somebody takes.

    Args:
        subject: Who, as the beginning of the message: "model.teacher: it reads".
        limit: Most tokens (prompt + response); None when nobody knows.
        longest_prompt: Tokens of the longest training prompt.
        sampling: Says how long a response may get.

    Raises:
        ValueError: They may.
    """
    longest = longest_prompt + sampling.max_new_tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"{subject} at most {limit} tokens, but the longest prompt has {longest_prompt} and sampling.max_new_tokens"
            f" is {sampling.max_new_tokens}. Set data.max_prompt_tokens and sampling.max_new_tokens so that both fit"
            f" (a server: start it with --max-model-len {longest + 1} or more)."
        )


def keep_fitting(
    problems: Sequence[Problem],
    lengths: Sequence[int],
    *,
    split: str,
    setting: str,
    context: int,
    max_new_tokens: int,
    max_prompt_tokens: int | None,
    drop: bool,
) -> tuple[list[Problem], int]:
    """Leave out problems whose prompts are too long, or refuse them.

    Args:
        problems: All of the split.
        lengths: Tokens of their prompts.
        split: Name of the split.
        setting: Name of the sampling settings, for messages.
        context: Most tokens that the student takes.
        max_new_tokens: Room for the response.
        max_prompt_tokens: Longest prompt; None is what the context leaves.
        drop: Leave long ones out with a warning.

    Returns:
        The problems that are left, and the length of the longest of their prompts.

    Raises:
        ValueError: There is no room for a prompt, nothing is left, or some would have to be dropped and may not.
    """
    limit = min(max_prompt_tokens or context, context - max_new_tokens)
    if limit < 1:
        raise ValueError(
            f"{setting}.max_new_tokens={max_new_tokens} leaves no room for a prompt in the context of"
            f" {context} tokens. Lower it."
        )
    fits = [length <= limit for length in lengths]
    left = [problem for problem, fit in zip(problems, fits, strict=True) if fit]
    longest_left = max((length for length, fit in zip(lengths, fits, strict=True) if fit), default=0)
    if all(fits):
        return left, longest_left
    longest, uid = max((length, problem.uid) for length, problem in zip(lengths, problems, strict=True))
    own_limit = "" if limit != max_prompt_tokens else f", data.max_prompt_tokens is {limit}"
    finding = (
        f"{fits.count(False)} of {len(problems)} {split} prompts are longer than {limit} tokens (longest: {longest}"
        f" tokens, problem {uid!r}; the context is {context} tokens, {setting}.max_new_tokens is"
        f" {max_new_tokens}{own_limit})."
    )
    if not left:
        raise ValueError(
            f"{finding} None is left: {'raise max_prompt_tokens' if own_limit else 'lower max_new_tokens'}."
        )
    if not drop:
        raise ValueError(f"{finding} Set data.drop_long_prompts: true, or change these numbers.")
    warnings.warn(f"{finding} They are left out.", stacklevel=2)
    return left, longest_left
