"""Dropout of the model's own configuration is off: what generated is then exactly what is trained.

That of an adapter is on where it was asked for, and is a function of step, rollout and position: whichever process
trains a rollout, beside whichever others, drops the same.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from opd_lightning.backends.hf.anatomy import body_states, portable_attention
from opd_lightning.backends.hf.weightless import is_weightless
from opd_lightning.interfaces import MicroBatch
from opd_lightning.randomness import derive_seed, hashed_uniforms

_PROBABILITY = re.compile(r"drop|jitter")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability and router jitter of the model to 0; its configuration keeps what it says.

    The mode cannot do it: gradient checkpointing and the dropout of an adapter need training mode.
    """
    for part in model.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and _PROBABILITY.search(name):
                setattr(part, name, 0.0)


def verify_no_noise(model: Any, argument: str) -> None:
    """Check on a few tokens that the model says the same in training and in evaluation.

    Args:
        model: The plain model, without adapter; its mode changes to training.
        argument: Name of the setting to blame.

    Raises:
        ValueError: It does not.
    """
    if is_weightless():
        return
    device = next(model.parameters()).device
    width = 7
    ids = torch.arange(width, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
    positions = torch.arange(width, device=device)[None]
    with torch.no_grad(), torch.random.fork_rng(), portable_attention(model):
        quiet = body_states(model.eval(), ids, None, positions)
        trained = body_states(model.train(), ids, None, positions)
    if not torch.allclose(quiet, trained, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"{argument}: {type(model).__name__} says something else in training than in evaluation, though all its"
            " dropout is off. Use a decoder-only model with attention, such as Qwen3, Llama, Mistral or Gemma."
        )


class RolloutDropout(nn.Dropout):
    """Dropout whose mask is a function of the seed last given to torch, layer, rollout, position and channel.

    Attributes:
        seeds: int64 [B, L] (or [1, T], packed), one for each token of the micro-batch under way; they stay for the
            backward pass, where gradient checkpointing asks for the same mask again.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__(p)
        self.layer_seed = derive_seed("dropout", layer)
        self.seeds: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Drop channels of [B, L, C] or [B * L, C]; tokens in another order fall back on torch's generator."""
        if not self.training or self.p == 0:
            return input
        if self.seeds is None or self.seeds.numel() != input[..., 0].numel():
            return super().forward(input)
        seeds = self.seeds.view(*input.shape[:-1], 1) ^ self.layer_seed
        kept = hashed_uniforms(seeds, torch.arange(input.shape[-1], device=input.device)) >= self.p
        return input * (kept / (1 - self.p)).to(input.dtype)


def key_dropout(model: PeftModel) -> None:
    """Put `RolloutDropout` in the place of the adapter's own."""
    for name, part in model.named_modules():
        for adapter, dropout in getattr(part, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                part.lora_dropout[adapter] = RolloutDropout(dropout.p, name)


def seed_dropout(model: nn.Module, batch: MicroBatch, packed: bool) -> None:
    """Tell the adapter's dropout which tokens come next: with padding, or `packed` end to end.

    The step is in the seed that torch was given for it.
    """
    parts = [part for part in model.modules() if isinstance(part, RolloutDropout)] if model.training else []
    if not parts:
        return
    step = torch.initial_seed()
    rollouts = [derive_seed(step, rollout.problem.uid, rollout.seed) for rollout in batch.rollouts]
    rows = torch.tensor(rollouts, device=batch.position_ids.device)[:, None]
    seeds = (hashed_uniforms(rows, batch.position_ids) * 2.0**62).long()
    seeds = seeds[batch.attention_mask.bool()][None] if packed else seeds
    for part in parts:
        part.seeds = seeds
