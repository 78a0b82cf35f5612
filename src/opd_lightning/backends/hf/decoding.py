"""The generation loop: left-padded prompts in, sampled tokens and their log-probabilities out.

Every prompt goes through the model once, however many responses it gets. Rows whose response is closed are dropped from
the cache as the batch empties. One uniform number per row and position decides the token, so a response does not depend
on its neighbours beyond the rounding of batched matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opd_lightning.backends.hf.anatomy import body_states, decoder_config
from opd_lightning.backends.hf.cache import RoomyCache
from opd_lightning.interfaces import Blend, Sampling, Student
from opd_lightning.randomness import hashed_uniforms
from opd_lightning.rollouts.sampling import draw_tokens

_UNIFORMS_AT_ONCE = 64  # positions hashed together: the hash is many small operations
_CROWDED = 0.875  # share of open rows below which closed ones are dropped; that copies the cache once, as a token does


@dataclass
class Responses:
    """What was sampled for R rows; entries past a row's length are meaningless.

    Attributes:
        token_ids: int64 [R, max_new_tokens].
        log_probs: float32 [R, max_new_tokens], nats.
        lengths: int64 [R], the closing token included.
        finished: bool [R], whether a stop id closed the response.
        own_log_probs: float32 [R, max_new_tokens]: the student's own, where another model had a say; 0 elsewhere.
    """

    token_ids: Tensor
    log_probs: Tensor
    lengths: Tensor
    finished: Tensor
    own_log_probs: Tensor

    @classmethod
    def empty(cls, num_rows: int, max_new_tokens: int, device: torch.device) -> Responses:
        """Results of rows that have not said anything yet."""
        return cls(
            token_ids=torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device),
            log_probs=torch.zeros(num_rows, max_new_tokens, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.int64, device=device),
            finished=torch.zeros(num_rows, dtype=torch.bool, device=device),
            own_log_probs=torch.zeros(num_rows, max_new_tokens, device=device),
        )

    def record(
        self, rows: Tensor, position: int, token_ids: Tensor, log_probs: Tensor, stop_ids: Tensor
    ) -> tuple[Tensor, int]:
        """Write one token per row and return which of the rows are still open, bool [B], and how many."""
        was_open = ~self.finished[rows]
        self.token_ids[rows, position] = token_ids
        self.log_probs[rows, position] = log_probs
        self.lengths[rows] += was_open
        is_open = was_open & ~torch.isin(token_ids, stop_ids)
        self.finished[rows] = ~is_open
        broken = was_open & ~log_probs.isfinite()
        # the one wait for the device per token
        num_open, num_broken = torch.stack([is_open.sum(), broken.sum()]).tolist()
        if num_broken:
            raise NonFiniteLogits(int(rows[broken][0]), position)
        return is_open, num_open

    def cpu(self) -> Responses:
        """Return a copy on the CPU."""
        return Responses(*(values.cpu() for values in vars(self).values()))


class NonFiniteLogits(FloatingPointError):
    """The model gave NaN or infinite logits.

    Attributes:
        row: Row of the batch in which it was noticed.
        position: Position in its response.
    """

    def __init__(self, row: int, position: int) -> None:
        super().__init__(f"non-finite logits in row {row} at response position {position}")
        self.row = row
        self.position = position


class LiveRows:
    """The rows still being written: their cache, and where their results go.

    Attributes:
        rows: int64 [B], index into the results.
        lengths: int64 [B], tokens of each so far.
        num_seen: Columns of the cache that are filled, padding included.
        mask: int64 [B, columns], 1 for real tokens; None when there is no padding.
        hidden: [B, H], final hidden states that predict the next token.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        room: int,
        own_precision: bool = False,
    ) -> None:
        self._own_precision = own_precision  # whatever autocast is in force
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (width - len(prompt)) + [1] * (len(prompt) + room) for prompt in prompts]
        has_padding = any(len(prompt) != width for prompt in prompts)
        self.model = model
        self.num_seen = 0  # columns, padding included
        self.mask = torch.tensor(masks, device=device) if has_padding else None
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.rows = torch.arange(len(prompts), device=device)
        with self._precision():
            self.cache = RoomyCache(decoder_config(model), device.type, most=width + room)
        positions = torch.arange(width, device=device) - (width - self.lengths[:, None])
        self.hidden = self._run(torch.tensor(padded, device=device), positions.clamp_(min=0))

    def append(self, token_ids: Tensor) -> None:
        """Feed one token per row."""
        self.hidden = self._run(token_ids[:, None], self.lengths[:, None])
        self.lengths = self.lengths + 1

    def select(self, indices: Tensor) -> None:
        """Keep or repeat the rows at the indices."""
        self.rows, self.lengths, self.hidden = self.rows[indices], self.lengths[indices], self.hidden[indices]
        self.mask = None if self.mask is None else self.mask[indices]
        # the one cache operation that every kind of layer has; its index may be shorter or longer than the batch
        self.cache.reorder_cache(indices)

    def _run(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        self.num_seen += input_ids.shape[1]
        mask = None if self.mask is None else self.mask[:, : self.num_seen]
        with self._precision():
            return body_states(self.model, input_ids, mask, position_ids, self.cache)[:, -1]

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.rows.device.type, enabled=False) if self._own_precision else nullcontext()


class _OtherRows(LiveRows):
    """The same rows as another model reads them, whose say changes what is drawn."""

    def __init__(self, blend: Blend, prompts: Sequence[Sequence[int]], pad_id: int, room: int) -> None:
        super().__init__(blend.model, prompts, pad_id, room, own_precision=True)
        self.blend, self.head = blend, blend.student.head(blend.model)

    def draw(self, logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B], their log-probabilities in the mixture, and those under the student alone."""
        own = (logits.float() / sampling.temperature).log_softmax(-1)
        with self._precision():
            other = (self.head(self.hidden).float() / sampling.temperature).log_softmax(-1)
        mixture = mix(own, other, self.blend.share)
        token_ids, log_probs = draw_tokens(mixture, uniforms, replace(sampling, temperature=1.0))
        return token_ids, log_probs, own.gather(-1, token_ids[:, None]).squeeze(-1)


def mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log((1 - share) p + share q), exactly log q for a share of 1."""
    if share == 1:
        return log_q
    return torch.logaddexp(log_p + math.log1p(-share), log_q + math.log(share))


def decode(
    student: Student,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prompt_of_row: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
    blend: Blend | None = None,
) -> Responses:
    """Sample one response per row.

    Args:
        student: Turns hidden states into logits.
        model: The loaded student, in evaluation mode and without gradients.
        prompts: Token ids of the different prompts.
        prompt_of_row: Index of the prompt of each of the R rows.
        seeds: Seed of each row.
        sampling: Temperature, cuts and length.
        stop_ids: Ids that close a response.
        blend: Another model that has a say in every token; None for none.

    Raises:
        NonFiniteLogits: The weights or the arithmetic are broken.
    """
    head = student.head(model)
    pad_id, room = student.tokenizer.pad_id, sampling.max_new_tokens
    live = LiveRows(model, prompts, pad_id, room)
    other = None if blend is None else _OtherRows(blend, prompts, pad_id, room)
    readers = [live] if other is None else [live, other]
    device, num_rows = live.hidden.device, len(prompt_of_row)
    for each in readers:
        each.select(torch.tensor(prompt_of_row, device=device))
        each.rows = torch.arange(num_rows, device=device)
    all_seeds, stops = torch.tensor(seeds, device=device), torch.tensor(stop_ids, device=device)
    responses = Responses.empty(num_rows, sampling.max_new_tokens, device)
    for position in range(sampling.max_new_tokens):
        offset = position % _UNIFORMS_AT_ONCE
        if offset == 0:
            block = torch.arange(position, position + _UNIFORMS_AT_ONCE, device=device)
            uniforms = hashed_uniforms(all_seeds[:, None], block)
        logits = head(live.hidden)
        if other is None:
            token_ids, log_probs = draw_tokens(logits, uniforms[live.rows, offset], sampling)
        else:
            drawn = other.draw(logits, uniforms[live.rows, offset], sampling)
            token_ids, log_probs, responses.own_log_probs[live.rows, position] = drawn
        is_open, num_open = responses.record(live.rows, position, token_ids, log_probs, stops)
        if num_open == 0 or position == sampling.max_new_tokens - 1:
            break
        if num_open <= _CROWDED * len(token_ids):
            kept = is_open.nonzero().squeeze(-1)
            for each in readers:
                each.select(kept)
            token_ids = token_ids[kept]
        for each in readers:
            each.append(token_ids)
    return responses
