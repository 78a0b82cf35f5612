"""Attention for rollouts that lie end to end in one row: one call per rollout, on its own tokens alone.

Its cost is the sum of squared lengths, where one mask over the whole row would cost the square of the sum. The masks
are what transformers has for a rollout alone, so windows and chunks are what they are there. Registered with
transformers as attention functions of their own, which are those of SDPA and eager attention for any other row.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, flash_attention_mask, sdpa_mask

PACKED = {"sdpa": "opd_packed_sdpa", "eager": "opd_packed_eager"}  # attention of transformers: what runs it by rollout
BOUNDS = "opd_packed_by_bounds"  # reads what flash attention reads


class Place(NamedTuple):
    """Where a rollout lies in the row."""

    prompt_start: int
    response_start: int
    num_prompt: int
    length: int  # prompt and response

    @property
    def has_prompt(self) -> bool:
        """Whether its prompt lies right before its response; else it is that of an earlier rollout."""
        return self.response_start == self.prompt_start + self.num_prompt


_places: ContextVar[Sequence[Place] | None] = ContextVar("where rollouts lie in the row under way", default=None)


def lay_end_to_end(prompts: Sequence[Sequence[int]], lengths: Sequence[int], shares_prompts: bool) -> list[Place]:
    """Places of rollouts in the order given.

    Args:
        prompts: Token ids of each rollout's prompt.
        lengths: Prompt and response tokens of each.
        shares_prompts: Whether a prompt that came before is left out.
    """
    starts: dict[Any, int] = {}
    places: list[Place] = []
    end = 0
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        key = tuple(prompt) if shares_prompts else i
        if key not in starts:
            starts[key] = end
            end += len(prompt)
        places.append(Place(starts[key], end, len(prompt), length))
        end += length - len(prompt)
    return places


@contextmanager
def lying_at(places: Sequence[Place]) -> Iterator[None]:
    """A context in which the one row that a model is given holds rollouts at these places."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


@dataclass(frozen=True)
class _RolloutMasks:
    """What the layers get as their mask when rollouts lie end to end.

    Attributes:
        places: Where each rollout lies.
        masks: [1, 1, L, L] for each rollout as its kind of attention takes it; None for the causal mask of SDPA.
        sizes: Tokens of the pieces that the row is cut into: a rollout, or a prompt that is shared, or its responses.
        pieces: Which of them each rollout consists of.
    """

    places: Sequence[Place]
    masks: Sequence[Tensor | None]
    sizes: list[int]
    pieces: list[tuple[int, ...]]

    @classmethod
    def at(cls, places: Sequence[Place], masks: Sequence[Tensor | None]) -> _RolloutMasks:
        """Those of rollouts at the places."""
        num_users = Counter(place.prompt_start for place in places)
        sizes: list[int] = []
        pieces: list[tuple[int, ...]] = []
        prompts: dict[int, int] = {}
        for place in places:
            if num_users[place.prompt_start] == 1:
                pieces.append((len(sizes),))
                sizes.append(place.length)
                continue
            if place.has_prompt:
                prompts[place.prompt_start] = len(sizes)
                sizes.append(place.num_prompt)
            pieces.append((prompts[place.prompt_start], len(sizes)))
            sizes.append(place.length - place.num_prompt)
        return cls(places, masks, sizes, pieces)


def _allowed(places: Sequence[Place], arguments: dict[str, Any]) -> dict[int, Tensor]:
    """Which token of a rollout sees which, for each length L as bool [L, L]: what transformers has for one alone."""
    num_tokens = places[-1].response_start + places[-1].length - places[-1].num_prompt
    if arguments["use_vmap"] or arguments["q_length"] != num_tokens or arguments["kv_length"] != num_tokens:
        raise NotImplementedError("its attention mask is a special one")
    allowed = {}
    for length in {place.length for place in places}:
        steps = torch.arange(length, device=arguments["device"])
        allowed[length] = arguments["mask_function"](0, 0, steps[:, None], steps[None, :]).expand(length, length)
    return allowed


def _sdpa_masks(**arguments: Any) -> Any:
    if (places := _places.get()) is None:
        return sdpa_mask(**arguments)
    allowed = _allowed(places, arguments)
    # the kernels know the causal mask themselves, and are faster so; asked once for all
    are_causal = torch.stack([(mask == torch.ones_like(mask).tril()).all() for mask in allowed.values()]).tolist()
    masks = {
        length: None if is_causal else mask[None, None]
        for (length, mask), is_causal in zip(allowed.items(), are_causal, strict=True)
    }
    return _RolloutMasks.at(places, [masks[place.length] for place in places])


def _eager_masks(**arguments: Any) -> Any:
    if (places := _places.get()) is None:
        return eager_mask(**arguments)
    least = torch.tensor(torch.finfo(arguments["dtype"]).min, dtype=arguments["dtype"], device=arguments["device"])
    masks = {
        length: torch.where(mask, torch.zeros_like(least), least)[None, None]
        for length, mask in _allowed(places, arguments).items()
    }
    return _RolloutMasks.at(places, [masks[place.length] for place in places])


def _by_rollout(attend: Callable[..., Any], masks: _RolloutMasks, *queries_keys_values: Tensor) -> Any:
    """Outputs [1, T, heads, D] of attention within each rollout."""
    # cut at once: the gradient of a slice is as large as the row, and there would be one for each rollout
    cut = [torch.split(row, masks.sizes, dim=2) for row in queries_keys_values]
    outputs = []
    for place, mask, pieces in zip(masks.places, masks.masks, masks.pieces, strict=True):
        parts = (row[pieces[0]] if len(pieces) == 1 else torch.cat([row[i] for i in pieces], dim=2) for row in cut)
        output = attend(*parts, mask)[0]
        outputs.append(output if place.has_prompt else output[:, place.num_prompt :])
    return torch.cat(outputs, dim=1), None


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    if not isinstance(attention_mask, _RolloutMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _by_rollout(lambda *part: sdpa_attention_forward(module, *part, **kwargs), attention_mask, query, key, value)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    forward = sys.modules[type(module).__module__].eager_attention_forward  # each architecture has its own
    if not isinstance(attention_mask, _RolloutMasks):
        return forward(module, query, key, value, attention_mask, **kwargs)
    return _by_rollout(lambda *part: forward(module, *part, **kwargs), attention_mask, query, key, value)


def _by_bounds(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """What flash attention makes of its arguments: rollouts from their bounds, windows by their size."""
    bounds, window = kwargs.pop("cu_seq_lens_q", None), kwargs.get("sliding_window")
    lengths = [query.shape[2]] if bounds is None else bounds.diff().tolist()
    masks: list[Tensor | None] = []
    for length in lengths:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        masks.append((mask if window is None else mask.triu(1 - window))[None, None])
    return _sdpa(
        module,
        query,
        key,
        value,
        _RolloutMasks.at(lay_end_to_end([()] * len(lengths), lengths, False), masks),
        **kwargs,
    )


for _name, _function, _mask in (
    (PACKED["sdpa"], _sdpa, _sdpa_masks),
    (PACKED["eager"], _eager, _eager_masks),
    (BOUNDS, _by_bounds, flash_attention_mask),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)
