"""The generation loop in tensors that never change their shape: the half of what compilers and CUDA graphs need.

Rows that have closed are written on until all have, and attention runs over the whole cache: more arithmetic than
`decode`, for a step that is always the same one. The tokens are those of `decode`. The other half is a step without
Python that cannot be traced: the masks of packed attention ask a context variable, where `torch.compile` breaks off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from opd_lightning.backends.hf.anatomy import body_states, decoder_config
from opd_lightning.backends.hf.cache import FixedCache
from opd_lightning.backends.hf.decoding import LiveRows, NonFiniteLogits, Responses
from opd_lightning.backends.hf.packed_attention import PACKED
from opd_lightning.interfaces import LinearHead, Sampling, Student
from opd_lightning.randomness import hashed_uniforms
from opd_lightning.rollouts.sampling import draw_tokens

_CHECK_EVERY = 16  # tokens between two waits for the device
_COLUMNS_AT_ONCE = 128  # the cache is a multiple of this long, so that prompts of other lengths find it long enough


def check_static(model: nn.Module) -> None:
    """Refuse models that cannot be run in fixed shapes.

    Raises:
        ValueError: Some layers do not attend to everything, or the attention kernel takes no mask.
    """
    config = decoder_config(model)
    if any(type(layer) is not StaticLayer for layer in FixedCache(config, "cpu", 1).layers):
        raise ValueError(
            "engine.static_shapes: expected a model whose layers all attend to everything that came before; this one"
            f" ({type(config).__name__}) has layers with windows or states. Leave static_shapes off."
        )
    implementation = config._attn_implementation
    if implementation not in {*PACKED, *PACKED.values()}:
        raise ValueError(
            f"engine.static_shapes: expected attention that takes a mask over a cache of fixed length, got"
            f" {implementation!r}. Set student.attn_implementation to sdpa, or leave static_shapes off."
        )


@dataclass
class _Tables:
    """Everything that a step reads and writes, R rows, C columns of cache, T positions of a response.

    Attributes:
        cache: Keys and values.
        mask: bool [R, C], false at padding.
        hidden: [R, H], final hidden states that predict the next token.
        position_ids: int64 [R], of the next token in its sequence.
        step: int64 [1], of the next token in its response.
        uniforms: float64 [R, T].
        token_ids: int64 [R, T].
        log_probs: float32 [R, T].
        lengths: int64 [R], of the responses.
        is_open: bool [R].
        is_broken: bool [R], whether logits were not finite.
    """

    cache: FixedCache
    mask: Tensor
    hidden: Tensor
    position_ids: Tensor
    step: Tensor
    uniforms: Tensor
    token_ids: Tensor
    log_probs: Tensor
    lengths: Tensor
    is_open: Tensor
    is_broken: Tensor

    @classmethod
    def like(cls, live: LiveRows, num_rows: int, num_columns: int, max_new_tokens: int) -> _Tables:
        """Tables for prompts like these, at addresses that stay."""
        device = live.hidden.device

        def table(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            cache=FixedCache(decoder_config(live.model), device.type, num_columns),
            mask=table(torch.bool, num_rows, num_columns),
            hidden=table(live.hidden.dtype, num_rows, live.hidden.shape[-1]),
            position_ids=table(torch.int64, num_rows),
            step=table(torch.int64, 1),
            uniforms=table(torch.float64, num_rows, max_new_tokens),
            token_ids=table(torch.int64, num_rows, max_new_tokens),
            log_probs=table(torch.float32, num_rows, max_new_tokens),
            lengths=table(torch.int64, num_rows),
            is_open=table(torch.bool, num_rows),
            is_broken=table(torch.bool, num_rows),
        )

    def fits(self, live: LiveRows, num_columns: int, max_new_tokens: int) -> bool:
        """Whether they can be used for these prompts as well."""
        return (
            self.mask.shape[1] >= num_columns
            and self.token_ids.shape[1] == max_new_tokens
            and (self.hidden.dtype, self.hidden.device) == (live.hidden.dtype, live.hidden.device)
            and self.cache.layers[0].keys.dtype == live.cache.layers[0].keys.dtype
        )

    def begin(self, live: LiveRows, prompt_of_row: Sequence[int], seeds: Sequence[int], num_real: int) -> None:
        """Start from the prompts; rows from `num_real` on are there for the shape only."""
        device, width = self.mask.device, live.num_seen
        rows = torch.tensor(prompt_of_row, device=device)
        self.cache.begin(live.cache, rows)
        self.mask.fill_(True)
        if live.mask is not None:
            self.mask[:, :width] = live.mask[rows, :width].bool()
        self.hidden.copy_(live.hidden[rows])
        self.position_ids.copy_(live.lengths[rows])
        steps = torch.arange(self.uniforms.shape[1], device=device)
        self.uniforms.copy_(hashed_uniforms(torch.tensor(seeds, device=device)[:, None], steps))
        for tensor in (self.step, self.token_ids, self.log_probs, self.lengths):
            tensor.zero_()
        self.is_open.copy_(torch.arange(len(rows), device=device) < num_real)
        self.is_broken.zero_()

    def num_open(self) -> int:
        """Rows still being written; waits for the device.

        Raises:
            NonFiniteLogits: The weights or the arithmetic are broken.
        """
        num_open, num_broken = torch.stack([self.is_open.sum(), self.is_broken.sum()]).tolist()
        if num_broken:
            row = int(self.is_broken.nonzero()[0])
            raise NonFiniteLogits(row, int((~self.log_probs[row].isfinite()).nonzero()[0]))
        return int(num_open)


class StaticDecoder:
    """`decode` in fixed shapes; its tables are kept from call to call.

    Args:
        num_rows: Rows of every batch; a smaller one is filled up.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._tables: _Tables | None = None

    def decode(
        self,
        student: Student,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        prompt_of_row: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> Responses:
        """Sample one response per row, as `decoding.decode` does.

        Raises:
            NonFiniteLogits: The weights or the arithmetic are broken.
        """
        max_new_tokens, num_real = sampling.max_new_tokens, len(prompt_of_row)
        live = LiveRows(model, prompts, student.tokenizer.pad_id, max_new_tokens)
        needed = live.num_seen + max_new_tokens
        if self._tables is None or not self._tables.fits(live, needed, max_new_tokens):
            num_columns = -(-needed // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE
            self._tables = _Tables.like(live, self._num_rows, num_columns, max_new_tokens)
        tables, num_spare = self._tables, self._num_rows - num_real
        tables.begin(live, [*prompt_of_row, *[0] * num_spare], [*seeds, *[0] * num_spare], num_real)
        head = student.head(model)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=live.hidden.device)
        for written in range(1, max_new_tokens + 1):
            _advance(model, head, tables, sampling, stops)
            if (written % _CHECK_EVERY == 0 or written == max_new_tokens) and tables.num_open() == 0:
                break
        return Responses(
            token_ids=tables.token_ids[:num_real],
            log_probs=tables.log_probs[:num_real],
            lengths=tables.lengths[:num_real],
            finished=~tables.is_open[:num_real],
            own_log_probs=torch.zeros_like(tables.log_probs[:num_real]),
        )

    def forget(self) -> None:
        """Free the tables."""
        self._tables = None


def _advance(model: nn.Module, head: LinearHead, tables: _Tables, sampling: Sampling, stops: Tensor) -> None:
    """Draw a token per row and feed it: the step that is always the same one."""
    uniforms = tables.uniforms.index_select(1, tables.step).squeeze(1)
    token_ids, log_probs = draw_tokens(head(tables.hidden), uniforms, sampling)
    tables.token_ids.index_copy_(1, tables.step, token_ids[:, None])
    tables.log_probs.index_copy_(1, tables.step, log_probs[:, None])
    tables.is_broken |= tables.is_open & ~log_probs.isfinite()
    tables.lengths += tables.is_open
    tables.is_open &= ~(token_ids[:, None] == stops).any(dim=-1)
    states = body_states(model, token_ids[:, None], tables.mask, tables.position_ids[:, None], tables.cache)
    tables.hidden.copy_(states[:, -1])
    tables.position_ids += 1
    tables.step += 1
