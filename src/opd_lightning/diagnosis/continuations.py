"""How deep is the teacher still useful: it goes on where the student's answers were cut (arXiv 2604.13016, Fig. 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from opd_lightning.diagnosis.estimates import estimate_mean
from opd_lightning.diagnosis.measurements import Continuation
from opd_lightning.interfaces import Prompt, Rollout, Sampling, Task, Tokenizer
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.answering import closed_text, grade

FRACTIONS = (0.125, 0.25, 0.5, 0.75)
Generate = Callable[[Sequence[Prompt], Sampling], list[Rollout]]


def depths_of(rollouts: Sequence[Rollout]) -> list[int]:
    """Where answers are cut: at eighths, quarters and halves of the longest one."""
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    return sorted({depth for fraction in FRACTIONS if 1 <= (depth := round(longest * fraction)) < longest})


def continue_answers(
    groups: Sequence[Sequence[Rollout]],
    depth: int,
    generate: Generate,
    *,
    task: Task,
    tokenizer: Tokenizer,
    sampling: Sampling,
    seed: int,
) -> Continuation:
    """Cut all answers that are longer than `depth` there, let the teacher end them, and compare the marks.

    Both have the same room: kept and new tokens together are at most `max_new_tokens`. Only answers that are longer
    than the depth take part, on both sides of the comparison, so deeper cuts look at longer, often harder answers:
    compare a gain with the student's accuracy beside it, not with the accuracies of other depths.

    Args:
        groups: Marked answers of the student, those of a prompt together; at least one is longer than `depth`.
        depth: Tokens that are kept.
        generate: The teacher's engine.
        task: Marks the answers.
        tokenizer: Decodes them.
        sampling: How the student's were sampled.
        seed: Of the run.
    """
    cut = [[rollout for rollout in group if len(rollout.response_ids) > depth] for group in groups]
    rollouts = [rollout for group in cut for rollout in group]
    prompts = [_cut_prompt(rollout, depth, seed) for rollout in rollouts]
    ended = generate(prompts, replace(sampling, max_new_tokens=sampling.max_new_tokens - depth))
    whole = [_joined(rollout, depth, end, tokenizer) for rollout, end in zip(rollouts, ended, strict=True)]
    marked = iter(grade(task, whole))
    return compare_answers(cut, [[next(marked) for _ in group] for group in cut], depth)


def compare_answers(
    student: Sequence[Sequence[Rollout]], teacher: Sequence[Sequence[Rollout]], depth: int = 0
) -> Continuation:
    """Marks of the student's answers beside those of the teacher's, pair by pair."""
    own, theirs = ([[rollout.reward for rollout in group] for group in groups] for groups in (student, teacher))
    gains = [[b - a for a, b in zip(*groups, strict=True)] for groups in zip(own, theirs, strict=True)]
    return Continuation(
        depth=depth,
        num_rollouts=sum(len(group) for group in own),
        student=estimate_mean(own).value,
        teacher=estimate_mean(theirs).value,
        gain=estimate_mean(gains),
    )


def _cut_prompt(rollout: Rollout, depth: int, seed: int) -> Prompt:
    token_ids = torch.cat([rollout.prompt_ids, rollout.response_ids[:depth]])
    return Prompt(rollout.problem, tuple(token_ids.tolist()), (derive_seed(seed, "continuation", depth, rollout.seed),))


def _joined(rollout: Rollout, depth: int, end: Rollout, tokenizer: Tokenizer) -> Rollout:
    """The student's beginning and the teacher's end as one answer to the problem."""
    response_ids = torch.cat([rollout.response_ids[:depth], end.response_ids])
    return replace(
        end,
        prompt_ids=rollout.prompt_ids,
        response_ids=response_ids,
        log_probs=torch.cat([rollout.log_probs[:depth], end.log_probs]),
        text=closed_text(tokenizer, response_ids.tolist(), end.finished),
    )
