"""Rollouts of a micro-batch laid end to end in one row, so that padding is not computed.

Positions start again with each rollout, and attention looks at one rollout at a time: its cost is the sum of squared
lengths, where one mask over the whole row would cost the square of the sum. With flash attention the kernel does this
itself; for SDPA and eager attention an attention function of the model's own kind is called once per rollout, with the
part of transformers' mask that belongs to it, so windows and chunks are what they are for a rollout alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, flash_attention_mask, sdpa_mask

from opd_lightning.backends.hf.anatomy import body_states, causal_lm, decoder_config
from opd_lightning.interfaces import MicroBatch
from opd_lightning.interfaces.modes import evaluation_mode

_SDPA, _EAGER, _BOUNDS = "opd_packed_sdpa", "opd_packed_eager", "opd_packed_by_bounds"
_WORTH = 0.1  # share of padding from which packing repays one call of attention per rollout
_lengths: ContextVar[Sequence[int] | None] = ContextVar("lengths of the rollouts in the packed row", default=None)


def response_states(model: nn.Module, batch: MicroBatch, packed: bool) -> Tensor:
    """Final hidden states [N, H] at `batch.rows, batch.columns`, with or without computing the padding.

    Args:
        model: A causal language model that `allow_packing` has seen, wrapped by peft or not.
        batch: On the model's device.
        packed: What `is_packed` says.
    """
    if not packed:
        states = body_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
        return states[batch.rows, batch.columns]
    is_real = batch.attention_mask.bool()
    lengths = batch.attention_mask.sum(dim=1).tolist()
    states = packed_states(model, batch.input_ids[is_real], batch.position_ids[is_real], lengths)
    places = is_real.flatten().cumsum(0).view_as(batch.attention_mask) - 1
    return states[places[batch.rows, batch.columns]]


def is_packed(model: nn.Module, batch: MicroBatch, packing: bool | None) -> bool:
    """Whether the padding of this micro-batch is left out.

    Args:
        model: A causal language model, wrapped by peft or not.
        batch: On any device.
        packing: True: where there is padding; None: where it is at least a tenth; False: nowhere.
    """
    if packing is False or not getattr(causal_lm(model), "opd_packs", False):
        return False
    share = 1.0 - float(batch.attention_mask.sum()) / batch.attention_mask.numel()
    return share >= _WORTH if packing is None else share > 0.0


def packed_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Final hidden states [T, H] of rollouts laid end to end.

    Args:
        model: A causal language model that `allow_packing` has seen.
        input_ids: int64 [T].
        position_ids: int64 [T], from 0 for each rollout.
        lengths: Tokens of each rollout; their sum is T.
    """
    arguments: dict[str, Any] = {}
    mask: Tensor | None = torch.ones_like(input_ids[None])  # positions without a mask make transformers cut one up
    if _runs_flash(decoder_config(model)._attn_implementation):
        mask = None
        bounds = torch.tensor([0, *lengths], device=input_ids.device).cumsum(0).to(torch.int32)
        arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        arguments |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    token = _lengths.set(lengths)
    try:
        return body_states(model, input_ids[None], mask, position_ids[None], **arguments)[0]
    finally:
        _lengths.reset(token)


# ------------------------------------------------------------------------------------------------------- which models


def allow_packing(model: nn.Module, packing: bool | None, role: str) -> None:
    """Let a loaded model be run packed where it can be; its attention then goes through this module.

    Args:
        model: A causal language model, wrapped by peft or not.
        packing: True: it must; None: where it can, said once where not; False: leave it alone.
        role: Whose setting it is: "student" or "teacher".

    Raises:
        ValueError: It must and cannot.
    """
    if packing is False:
        return
    lm = causal_lm(model)
    reason = _reason_against(model)
    lm.opd_packs = reason is None
    if reason is None:
        return
    said = f"{role}.packing: rollouts of a {type(lm).__name__} cannot be laid end to end ({reason})"
    if packing:
        raise ValueError(f"{said}. Leave the setting out: they are padded then.")
    warnings.warn(f"{said}, so they are padded. Nothing else changes; false says so without this.", stacklevel=3)


def _reason_against(model: nn.Module) -> str | None:
    lm: Any = causal_lm(model)
    implementation = decoder_config(model)._attn_implementation
    if _runs_flash(implementation):
        with _attention(lm, _BOUNDS) as fault:  # its kernels do not run on a CPU: what they are told is checked
            return fault or _difference(model)
    packed = {"sdpa": _SDPA, "eager": _EAGER}.get(implementation)
    if packed is None:
        return f"attention {implementation!r} has no such mode: use 'sdpa', 'eager' or flash attention"
    with _attention(lm, packed) as fault:
        reason = fault or _difference(model)
    if reason is None:
        lm.set_attn_implementation(packed)
    return reason


def _runs_flash(implementation: str) -> bool:
    return "flash" in implementation or implementation == _BOUNDS  # transformers tells them by their names as well


@contextmanager
def _attention(lm: Any, implementation: str) -> Iterator[str | None]:
    """Run another attention for a while; gives the reason why it cannot, or None."""
    before = lm.config._attn_implementation
    try:
        lm.set_attn_implementation(implementation)
        yield None if lm.config._attn_implementation == implementation else "its attention cannot be replaced"
    finally:
        lm.set_attn_implementation(before)


def _difference(model: nn.Module) -> str | None:
    """What goes wrong with three short rollouts, or None.

    That the last one does not see what is before it is checked to the last bits, on rows of the same shape: recurrent
    states run through a whole row, and fade.
    """
    config, lm = decoder_config(model), causal_lm(model)
    lengths = (5, 4, 6)
    device = next(lm.parameters()).device
    ids = (torch.arange(sum(lengths), device=device) * 7919 + 13) % config.vocab_size
    others = torch.cat([(ids[: -lengths[-1]] + 5) % config.vocab_size, ids[-lengths[-1] :]])
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    last = slice(-lengths[-1], None)
    try:
        with torch.no_grad(), evaluation_mode(model):
            alone = body_states(model, ids[last][None], None, positions[last][None])[0].float()
            packed, beside_others = (
                packed_states(model, tokens, positions, lengths)[last].float() for tokens in (ids, others)
            )
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    size = 1.0 + float(alone.abs().max())
    is_exact = lm.dtype in (torch.float32, torch.float64)
    if not float((packed - beside_others).abs().max()) <= 16 * torch.finfo(lm.dtype).eps * size:
        return "a rollout sees the one before it"
    if not float((packed - alone).abs().max()) <= (1e-4 if is_exact else 0.1) * size:
        return "a rollout does not say what it says alone"
    return None


# ---------------------------------------------------------------------------------------- attention, rollout by rollout


@dataclass(frozen=True)
class _RolloutMasks:
    """What the layers get as their mask when rollouts lie end to end.

    Attributes:
        lengths: Tokens of each rollout.
        masks: [1, 1, L, L] for each rollout as its kind of attention takes it; None for the causal mask of SDPA.
    """

    lengths: Sequence[int]
    masks: Sequence[Tensor | None]


def _allowed(lengths: Sequence[int], arguments: dict[str, Any]) -> dict[int, Tensor]:
    """Which token of a rollout sees which, for each length L as bool [L, L]: what transformers has for one alone."""
    if arguments["use_vmap"] or arguments["q_length"] != sum(lengths) or arguments["kv_length"] != sum(lengths):
        raise NotImplementedError("its attention mask is a special one")
    allowed = {}
    for length in set(lengths):
        places = torch.arange(length, device=arguments["device"])
        allowed[length] = arguments["mask_function"](0, 0, places[:, None], places[None, :]).expand(length, length)
    return allowed


def _sdpa_masks(**arguments: Any) -> Any:
    if (lengths := _lengths.get()) is None:
        return sdpa_mask(**arguments)
    allowed = _allowed(lengths, arguments)
    # the kernels know the causal mask themselves, and are faster so; asked once for all
    are_causal = torch.stack([(mask == torch.ones_like(mask).tril()).all() for mask in allowed.values()]).tolist()
    masks = {
        length: None if is_causal else mask[None, None]
        for (length, mask), is_causal in zip(allowed.items(), are_causal, strict=True)
    }
    return _RolloutMasks(lengths, [masks[length] for length in lengths])


def _eager_masks(**arguments: Any) -> Any:
    if (lengths := _lengths.get()) is None:
        return eager_mask(**arguments)
    least = torch.tensor(torch.finfo(arguments["dtype"]).min, dtype=arguments["dtype"], device=arguments["device"])
    masks = {
        length: torch.where(mask, torch.zeros_like(least), least)[None, None]
        for length, mask in _allowed(lengths, arguments).items()
    }
    return _RolloutMasks(lengths, [masks[length] for length in lengths])


def _by_rollout(attend: Callable[..., Any], masks: _RolloutMasks, query: Tensor, *keys_values: Tensor) -> Any:
    """Outputs [1, T, heads, D] of attention within each rollout."""
    parts = zip(
        *(states.split(list(masks.lengths), dim=2) for states in (query, *keys_values)), masks.masks, strict=True
    )
    return torch.cat([attend(*part)[0] for part in parts], dim=1), None


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
    masks = []
    for length in lengths:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        masks.append((mask if window is None else mask.triu(1 - window))[None, None])
    return _sdpa(module, query, key, value, _RolloutMasks(lengths, masks), **kwargs)


for _name, _function, _mask in (
    (_SDPA, _sdpa, _sdpa_masks),
    (_EAGER, _eager, _eager_masks),
    (_BOUNDS, _by_bounds, flash_attention_mask),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)
