"""Rollouts in, padded micro-batches out, under a token budget.

Sorting by length keeps padding small; the budget keeps the longest responses from blowing the memory. Neither changes
the gradient: losses are summed over response tokens and divided by the step's global number of them.
Does not know models or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.interfaces import MicroBatch, ResponseTokens, Rollout


def sequence_length(rollout: Rollout) -> int:
    """Prompt and response tokens of a rollout."""
    return len(rollout.prompt_ids) + len(rollout.response_ids)


def cut_by_tokens(rollouts: Sequence[Rollout], max_tokens: int, at_least: int = 1) -> list[list[Rollout]]:
    """Cut rollouts into groups whose padded size (rows times longest sequence) stays within the budget.

    As few groups as the budget allows, and the largest of so many as small as can be: the last one is no remainder, and
    the peak of memory is no higher than it must. Longest sequences come first, so that running out of memory happens
    at once and not late in the step. The order is a function of lengths and of the given order only. Where there are
    fewer than `at_least` groups, those of the most rollouts are halved until there are so many, or one rollout in each.

    Raises:
        ValueError: One sequence alone exceeds the budget.
    """
    ordered = sorted(rollouts, key=sequence_length, reverse=True)
    lengths = [sequence_length(rollout) for rollout in ordered]
    if lengths and lengths[0] > max_tokens:
        raise ValueError(
            f"max_tokens_per_micro_batch={max_tokens}: the rollout of problem {ordered[0].problem.uid!r} alone has"
            f" {lengths[0]} tokens. Raise the budget to at least {lengths[0]}, or lower sampling.max_new_tokens."
        )
    fewest = len(_group_sizes(lengths, max_tokens))
    low, high = max(lengths, default=0), max_tokens
    while low < high:  # the least budget that needs no more groups
        budget = (low + high) // 2
        if len(_group_sizes(lengths, budget)) == fewest:
            high = budget
        else:
            low = budget + 1
    rest = iter(ordered)
    sizes = _group_sizes(lengths, high)
    while 0 < len(sizes) < min(at_least, len(lengths)):
        i = sizes.index(max(sizes))
        sizes[i : i + 1] = [-(-sizes[i] // 2), sizes[i] // 2]
    return [list(islice(rest, size)) for size in sizes]


def _group_sizes(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """How many of the lengths, longest first, go into each group under the budget."""
    sizes: list[int] = []
    longest = 0
    for length in lengths:
        if not sizes or (sizes[-1] + 1) * longest > max_tokens:
            sizes.append(0)
            longest = length
        sizes[-1] += 1
    return sizes


def blank_micro_batch(pad_id: int) -> MicroBatch:
    """One token and nothing to compare: what a process runs to keep pace with others."""
    token, none = torch.full((1, 1), pad_id), torch.zeros(0, dtype=torch.int64)
    tokens = ResponseTokens(none, torch.zeros(0), none)
    return MicroBatch(token, torch.ones_like(token), torch.zeros_like(token), none, none, tokens, ())


def collate(rollouts: Sequence[Rollout], pad_id: int, *, side: Literal["left", "right"] = "right") -> MicroBatch:
    """Pad prompt + response of each rollout into one [B, L] batch and point at its response tokens.

    Args:
        rollouts: At least one rollout.
        pad_id: Fills the padding; may equal a stop id, since nothing ever looks for it.
        side: Where the padding goes.
    """
    # few operations on whole micro-batches, not many on each rollout: with short rollouts those take longer than moving
    # the tokens
    lengths = torch.tensor([sequence_length(rollout) for rollout in rollouts])
    width = int(lengths.max())
    starts = width - lengths if side == "left" else torch.zeros_like(lengths)
    steps = torch.arange(width) - starts[:, None]
    is_real = (steps >= 0) & (steps < lengths[:, None])
    input_ids = torch.full(is_real.shape, pad_id, dtype=torch.int64)
    token_ids = [ids.long() for rollout in rollouts for ids in (rollout.prompt_ids, rollout.response_ids)]  # or empty
    input_ids[is_real] = torch.cat(token_ids)

    sizes = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    places = _trained_places(rollouts)
    rows = torch.arange(len(rollouts)).repeat_interleave(sizes)[places]
    positions = places - (sizes.cumsum(0) - sizes)[rows]
    firsts = starts + lengths - sizes - 1  # the last prompt token predicts the first response token
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=is_real.long(),
        position_ids=torch.where(is_real, steps, 0),
        rows=rows,
        columns=firsts[rows] + positions,
        tokens=ResponseTokens(
            torch.cat(token_ids[1::2])[places],
            torch.cat([rollout.log_probs for rollout in rollouts])[places],
            positions,
            {name: values[places] for name, values in _join_extras(rollouts).items()},
        ),
        rollouts=tuple(rollouts),
    )


def _trained_places(rollouts: Sequence[Rollout]) -> Tensor:
    """int64 [N]: where the tokens that the student wrote are in all responses laid end to end."""
    if all(rollout.student_wrote is None for rollout in rollouts):
        return torch.arange(sum(len(rollout.response_ids) for rollout in rollouts))
    wrote = (
        torch.ones(len(rollout.response_ids), dtype=torch.bool)
        if rollout.student_wrote is None
        else rollout.student_wrote
        for rollout in rollouts
    )
    return torch.cat(list(wrote)).nonzero().squeeze(-1)


def _join_extras(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    names = rollouts[0].extras.keys()
    assert all(rollout.extras.keys() == names for rollout in rollouts), "an objective shapes all rollouts or none"
    return {name: torch.cat([rollout.extras[name] for rollout in rollouts]) for name in names}
