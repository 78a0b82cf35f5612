"""Models without weights: what `load` and `setup` give while tensors have shapes only, for planning.

Inside `without_data` every tensor that torch makes is one of its fake tensors: shape, dtype and device, no memory. A
model is then built from its configuration alone, so neither weight files nor memory nor the hardware are needed, and
everything that runs on it runs the code of a real step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode  # as torch's own documentation imports it
from transformers import AutoModelForCausalLM, PreTrainedConfig


@contextmanager
def without_data() -> Iterator[None]:
    """Within, tensors have shapes and no data."""
    before = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        with FakeTensorMode():
            yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, behind `module.to`: torch's own swaps fake tensors, which fails for those that are shared."""
    for child in module.children() if recurse else ():
        _apply(child, fn)
    for name, weight in module._parameters.items():
        if weight is not None:
            with torch.no_grad():
                changed = fn(weight)
            if (changed.dtype, changed.device) != (weight.dtype, weight.device):
                module._parameters[name] = nn.Parameter(changed, weight.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def is_weightless() -> bool:
    """Whether tensors have no data just now."""
    return active_fake_mode() is not None


def blank_model(config: PreTrainedConfig, dtype: torch.dtype | str, attn_implementation: str | None) -> Any:
    """A model of that configuration, in evaluation mode, whose weights were not read and are not there."""
    if dtype == "auto":
        dtype = config.get_text_config(decoder=True).dtype or torch.float32
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
