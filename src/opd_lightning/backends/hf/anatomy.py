"""Where body and head of a causal language model are, and how to run them apart.

The body turns token ids into final hidden states; the head turns hidden states into logits. Run apart, prompts and
padding never reach the head, which is most of the memory when the vocabulary is large. Whether the two together really
are the model is checked once, when it is loaded (`verify_anatomy`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache

from opd_lightning.backends.hf.sharding import body_of, gather_root
from opd_lightning.backends.hf.weightless import is_weightless
from opd_lightning.interfaces import LinearHead
from opd_lightning.interfaces.modes import evaluation_mode

_HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def causal_lm(model: nn.Module) -> Any:
    """Return the transformers model itself, out of its peft wrapper if it has one (adapters stay in place)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_config(model: nn.Module) -> Any:
    """Return the configuration of the text decoder (multimodal models nest it)."""
    return causal_lm(model).config.get_text_config(decoder=True)


def body_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Any = None,
    **arguments: Any,
) -> Tensor:
    """Run the body: token ids [B, L] to final hidden states [B, L, H], the last norm included.

    Args:
        model: A causal language model, wrapped by peft or not.
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L] (or [B, cached + L]), 1 for real tokens; None when there is no padding.
        position_ids: int64 [B, L]; always passed, because what a model makes up itself is wrong under left padding.
        cache: Keys and values of the tokens before these; filled in place.
        arguments: For the attention kernel.
    """
    output = body_of(causal_lm(model))(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
        **arguments,
    )
    states: Tensor = output.last_hidden_state
    return states


def linear_head(model: nn.Module, num_rows: int) -> LinearHead:
    """Return the layer that turns hidden states into logits, as data, with its adapter added to the weight if it is on.

    The sum has the weight's own dtype: in a bfloat16 head, or under autocast, updates below about 1/256 of a weight are
    lost there, as they are when the adapter is merged.

    Args:
        model: A causal language model, wrapped by peft or not.
        num_rows: Real tokens; further rows are padding.
    """
    gather_root(causal_lm(model))
    layer, config = causal_lm(model).get_output_embeddings(), decoder_config(model)
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= factor
    if (factor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= factor
    if (factor := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        scale *= factor
    return LinearHead(
        weight=_head_weight(layer),
        bias=_without_adapter(layer).bias,
        num_rows=num_rows,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
    )


def _without_adapter(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _head_weight(layer: Any) -> Tensor:
    """[R, H] weight of a head, with gradient to its adapters where they are on."""
    weight: Tensor = _without_adapter(layer).weight
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _check_head(model: nn.Module, argument: str) -> None:
    """Refuse heads that are more than a weight and a bias."""
    lm = causal_lm(model)
    layer = lm.get_output_embeddings()
    plain = _without_adapter(layer)
    if not isinstance(plain, nn.Linear) or plain.weight.dtype not in _HEAD_DTYPES:
        dtype = getattr(getattr(plain, "weight", None), "dtype", "no")
        raise ValueError(
            f"{argument}: the head of {type(lm).__name__} is a {type(plain).__name__} with {dtype} weights; expected a"
            " linear layer that is not quantised. Leave it out of the quantization (bitsandbytes:"
            " llm_int8_skip_modules: [lm_head]), or use a decoder-only model such as Qwen3, Llama, Mistral or Gemma."
        )
    if isinstance(layer, BaseTunerLayer) and (
        not isinstance(layer, LoraLinear) or layer.lora_variant or any(layer.lora_bias.values())
    ):
        raise ValueError(
            f"{argument}: the adapter on the head of {type(lm).__name__} is more than a low-rank update (DoRA, a bias,"
            " ...), which is not supported. Leave the head out of it, or merge it into its base model first."
        )


def verify_anatomy(model: nn.Module, argument: str, *, generates: bool) -> None:
    """Check on a few tokens that body plus head is the model, and that neither left padding nor the cache changes it.

    Args:
        model: The loaded model; neither its mode nor the random state changes.
        argument: Name of the setting to blame, for example ``"student.path"``.
        generates: Whether it must also be able to continue from a cache.

    Raises:
        ValueError: This architecture does more than body and head, or does not take masks, positions or our cache.
    """
    _check_head(model, argument)
    if is_weightless():
        return
    lm = causal_lm(model)
    name = type(lm).__name__
    try:
        with torch.no_grad(), evaluation_mode(model), portable_attention(lm):
            differences, tolerance = _anatomy_differences(model, generates)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument}: {name} cannot be run as decoder body and language-model head ({_first_line(error)})."
            " Use a decoder-only model with attention, such as Qwen3, Llama, Mistral or Gemma."
        ) from error
    if math.isnan(tolerance):
        raise ValueError(f"{argument}: the logits of {name} are NaN: its weights are damaged, or its dtype overflows.")
    for what, value in differences.items():
        if not value <= tolerance:
            raise ValueError(
                f"{argument}: {name} is not supported: {what} (largest difference {value:.2g}, tolerance"
                f" {tolerance:.2g}). Use a decoder-only model with attention, such as Qwen3, Llama, Mistral or Gemma."
            )


@contextmanager
def portable_attention(lm: Any) -> Iterator[None]:
    """Run attention through a kernel that works everywhere: it is the architecture that is checked.

    Flash kernels do not run on a CPU.
    """
    implementation = lm.config._attn_implementation
    if implementation in ("eager", "sdpa"):
        yield
        return
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(implementation)


def _anatomy_differences(model: nn.Module, generates: bool) -> tuple[dict[str, float], float]:
    """Largest difference of each way of running the model from the plain one, and how much is rounding."""
    lm, config = causal_lm(model), decoder_config(model)
    device = next(lm.parameters()).device
    width, num_padding = 7, 3
    ids = (torch.arange(width, device=device) * 7919 + 13) % config.vocab_size
    alone = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, width, dtype=torch.int64, device=device),
        "position_ids": torch.arange(width, device=device)[None],
    }
    padded = {name: nn.functional.pad(tensor, (num_padding, 0)) for name, tensor in alone.items()}
    expected = lm(**alone, use_cache=False).logits[0].float()

    def largest_difference(states: Tensor) -> float:
        logits = linear_head(model, expected.shape[-1])(states)
        return float((logits - expected[-len(states) :]).abs().max())

    differences = {
        "its logits are not head(body)": largest_difference(body_states(model, **alone)[0]),
        "left padding changes its output": largest_difference(body_states(model, **padded)[0, num_padding:]),
    }
    if generates:
        cache = DynamicCache(config=config)
        split = num_padding + 4
        first = {name: tensor[:, :split] for name, tensor in padded.items()}
        rest = {name: tensor[:, split:] for name, tensor in padded.items()} | {
            "attention_mask": padded["attention_mask"]
        }
        body_states(model, **first, cache=cache)
        differences["it does not continue from a cache"] = largest_difference(
            body_states(model, **rest, cache=cache)[0]
        )
    is_exact = lm.dtype in (torch.float32, torch.float64) and not getattr(lm, "is_quantized", False)
    tolerance = 1e-3 if is_exact else 0.1
    return differences, tolerance * (1.0 + float(expected.abs().max()))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
