"""Rollouts of a micro-batch laid end to end in one row: no padding is computed, and a prompt once for its rollouts.

Positions start again with each rollout, and attention keeps to one rollout: with flash attention the kernel does, given
the bounds; for SDPA and eager attention `packed_attention` does. These two also let rollouts of one prompt share its
tokens: everything but attention is done once for them. Whether a model can be run so is checked when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.backends.hf.anatomy import body_states, causal_lm, decoder_config
from opd_lightning.backends.hf.dropout import RolloutDropout
from opd_lightning.backends.hf.packed_attention import BOUNDS, PACKED, Place, lay_end_to_end, lying_at
from opd_lightning.backends.hf.weightless import is_weightless
from opd_lightning.interfaces import MicroBatch
from opd_lightning.interfaces.modes import evaluation_mode


def response_states(model: nn.Module, batch: MicroBatch, packed: bool) -> Tensor:
    """Final hidden states [N, H] at `batch.rows, batch.columns`, with or without computing the padding.

    Args:
        model: A causal language model that `allow_packing` has seen, wrapped by peft or not.
        batch: On the model's device.
        packed: What `is_packed` says.
    """
    if not packed or not batch.rollouts:  # a probe has none
        states = body_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
        return states[batch.rows, batch.columns]
    prompts = [rollout.prompt_ids.tolist() for rollout in batch.rollouts]
    shares_prompts = not _runs_flash(decoder_config(model)._attn_implementation) and not _drops(model)
    places = lay_end_to_end(prompts, batch.attention_mask.sum(dim=1).tolist(), shares_prompts)
    columns = torch.tensor(places, device=batch.input_ids.device)  # [B, 4]
    prompt_starts, response_starts, num_prompt, _ = columns[:, :, None].unbind(dim=1)  # [B, 1] each
    has_prompt = response_starts == prompt_starts + num_prompt
    is_laid = batch.attention_mask.bool() & (has_prompt | (batch.position_ids >= num_prompt))
    states = packed_states(model, batch.input_ids[is_laid], batch.position_ids[is_laid], places)
    after_prompt = batch.position_ids - num_prompt
    found = torch.where(after_prompt < 0, prompt_starts + batch.position_ids, response_starts + after_prompt)
    return states[found[batch.rows, batch.columns]]


def _drops(model: nn.Module) -> bool:
    """Whether an adapter's dropout is on: each rollout draws its own, on its prompt as well."""
    return model.training and any(isinstance(part, RolloutDropout) and part.p > 0 for part in model.modules())


def is_packed(model: nn.Module, packing: bool | None) -> bool:
    """Whether this model's rollouts are laid end to end, under the setting `packing`."""
    return packing is not False and getattr(causal_lm(model), "opd_packs", False)


def packed_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, places: Sequence[Place]) -> Tensor:
    """Final hidden states [T, H] of rollouts laid end to end.

    Args:
        model: A causal language model that `allow_packing` has seen.
        input_ids: int64 [T].
        position_ids: int64 [T], that of a token in its rollout.
        places: Where each rollout lies.
    """
    arguments: dict[str, Any] = {}
    mask: Tensor | None = torch.ones_like(input_ids[None])  # positions without a mask make transformers cut one up
    if _runs_flash(decoder_config(model)._attn_implementation):
        mask = None
        lengths = [place.length for place in places]
        bounds = torch.tensor([0, *lengths], device=input_ids.device).cumsum(0).to(torch.int32)
        arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        arguments |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    with lying_at(places):
        return body_states(model, input_ids[None], mask, position_ids[None], **arguments)[0]


# ------------------------------------------------------------------------------------------------------- which models


def allow_packing(model: nn.Module, packing: bool | None, role: str) -> None:
    """Let a loaded model be run packed where it can be; its attention then goes through this module.

    Args:
        model: A causal language model, wrapped by peft or not.
        packing: True: it must; None: it may, said where it cannot; False: leave it alone.
        role: Whose setting it is: "student" or "teacher".

    Raises:
        ValueError: It must and cannot.
    """
    if packing is False or is_weightless():  # without data nobody knows where a rollout ends
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
        with _attention(lm, BOUNDS) as fault:  # its kernels do not run on a CPU: what they are told is checked
            return fault or _difference(model)
    packed = PACKED.get(implementation)
    if packed is None:
        return f"attention {implementation!r} has no such mode: use 'sdpa', 'eager' or flash attention"
    with _attention(lm, packed) as fault:
        reason = fault or _difference(model)
    if reason is None:
        lm.set_attn_implementation(packed)
    return reason


def _runs_flash(implementation: str) -> bool:
    return "flash" in implementation or implementation == BOUNDS  # transformers tells them by their names as well


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
    """What goes wrong with two short rollouts of a prompt, or None.

    That the second does not see the first is checked to the last bits, on rows of the same shape: recurrent states run
    through a whole row, and fade.
    """
    config, lm = decoder_config(model), causal_lm(model)
    device = next(lm.parameters()).device
    num_prompt, num_first, num_second = 4, 3, 5
    ids = (torch.arange(num_prompt + num_first + num_second, device=device) * 7919 + 13) % config.vocab_size
    prompt, first, second = ids.split([num_prompt, num_first, num_second])
    positions = torch.arange(num_prompt + max(num_first, num_second), device=device)
    shares = not _runs_flash(config._attn_implementation)
    lengths = (num_prompt + num_first, num_prompt + num_second)
    places = lay_end_to_end([prompt.tolist()] * 2, lengths, shares)
    rest = slice(num_prompt if shares else 0, lengths[1])
    laid_positions = torch.cat([positions[: lengths[0]], positions[rest]])

    def beside(neighbour: Tensor) -> Tensor:
        tokens = torch.cat([prompt, neighbour, torch.cat([prompt, second])[rest]])
        return packed_states(model, tokens, laid_positions, places)[-num_second:].float()

    try:
        with torch.no_grad(), evaluation_mode(model):
            whole = torch.cat([prompt, second])
            alone = body_states(model, whole[None], None, positions[None, : lengths[1]])[0, -num_second:].float()
            packed, beside_another = beside(first), beside((first + 5) % config.vocab_size)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    size = 1.0 + float(alone.abs().max())
    is_exact = lm.dtype in (torch.float32, torch.float64)
    if not float((packed - beside_another).abs().max()) <= 16 * torch.finfo(lm.dtype).eps * size:
        return "a rollout sees the one before it"
    if not float((packed - alone).abs().max()) <= (1e-4 if is_exact else 0.1) * size:
        return "a rollout does not say what it says alone"
    return None
