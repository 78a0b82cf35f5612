"""Dropout of the model's own configuration is off: what generated is then exactly what is trained."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from opd_lightning.backends.hf.anatomy import body_states, portable_attention

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
