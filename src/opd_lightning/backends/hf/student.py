"""`HFStudent`: any decoder-only model that transformers loads, trained whole or through a LoRA adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opd_lightning.backends.hf.adapters import LoraSettings, add_lora, load_adapter, without_adapter
from opd_lightning.backends.hf.anatomy import causal_lm, linear_head, verify_anatomy
from opd_lightning.backends.hf.dropout import key_dropout, seed_dropout, switch_off_dropout, verify_no_noise
from opd_lightning.backends.hf.loading import (
    ModelSource,
    check_dtype,
    load_config,
    load_eos_ids,
    load_model,
    load_tokenizer,
    most_tokens,
)
from opd_lightning.backends.hf.packing import allow_packing, is_packed, response_states
from opd_lightning.backends.hf.saving import plain_weights, save_configuration, save_model
from opd_lightning.backends.hf.sharding import shard_causal_lm
from opd_lightning.backends.hf.tokenizer import HFTokenizer, check_vocabulary_rows, read_template
from opd_lightning.interfaces import LinearHead, MicroBatch, Student


class HFStudent(Student):
    """A causal language model from a local folder or the hub.

    The constructor reads no file; tokenizer and configuration are read on first use, weights by `load`. The model is
    used as body and head (`anatomy`), and `load` refuses architectures that are more than that.

    Args:
        path: Local folder or hub id.
        lora: Train a fresh low-rank adapter instead of all weights.
        dtype: Dtype of the weights: float32 for what is trained (run it under bf16 autocast on a GPU: the small steps
            of fine-tuning round to nothing in bfloat16 weights); bfloat16 is fine for the frozen base of an adapter.
        attn_implementation: Attention kernel, for example "sdpa" or "flash_attention_2"; None lets transformers choose.
        gradient_checkpointing: Recompute layer by layer in the backward pass: less memory, about a third more time.
        trust_remote_code: Whether code that comes with the model may run.
        revision: Branch, tag or commit on the hub.
        chat_template: Template that replaces the tokenizer's own: its text, or a file that holds it.
        template_kwargs: Extra variables of the template, for example ``{"enable_thinking": False}``.
        extra_stop_tokens: Tokens that close a response besides those the model and the tokenizer name.
        max_context_length: Use less than the context the model was made for.
        adapter_path: Go on training this saved LoRA adapter of the model at `path`.
        packing: Lay the rollouts of a micro-batch end to end instead of padding them, and compute a prompt once for its
            rollouts: null where the model can be run so (those with recurrent layers cannot), true refuses others,
            false pads.

    Raises:
        ValueError: The settings contradict each other.
    """

    def __init__(
        self,
        path: str,
        lora: LoraSettings | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        extra_stop_tokens: list[int | str] | None = None,
        max_context_length: int | None = None,
        adapter_path: str | None = None,
        packing: bool | None = None,
    ) -> None:
        check_dtype("student", dtype)
        if lora is not None and adapter_path is not None:
            raise ValueError("student.lora: a saved adapter brings its own settings; leave out lora or adapter_path.")
        if max_context_length is not None and max_context_length < 2:
            raise ValueError(f"student.max_context_length: expected at least 2 tokens, got {max_context_length}.")
        self.path = path
        self.lora = lora
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.chat_template = chat_template
        self.template_kwargs = template_kwargs
        self.extra_stop_tokens = extra_stop_tokens
        self.max_context_length = max_context_length
        self.adapter_path = adapter_path
        self.packing = packing

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is trained, so that the base model is still there (`as_base`)."""
        return self.lora is not None or self.adapter_path is not None

    @cached_property
    def source(self) -> ModelSource:
        """Where the model comes from."""
        return ModelSource(self.path, "student", self.revision, self.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        return load_config(self.source)

    @cached_property
    def template(self) -> str | None:
        """Text of the chat template that replaces the tokenizer's own."""
        return None if self.chat_template is None else read_template(self.chat_template, self.source.role)

    @cached_property
    def tokenizer(self) -> HFTokenizer:
        """The student's tokenizer."""
        eos_ids = load_eos_ids(self.source, self.config)
        tokenizer = HFTokenizer(
            load_tokenizer(self.source),
            eos_ids,
            self.template,
            self.template_kwargs,
            self.extra_stop_tokens,
        )
        tokenizer.check()
        check_vocabulary_rows(self.source, self.config, tokenizer)
        return tokenizer

    def with_template(self, changes: Mapping[str, Any]) -> HFStudent:
        """The same student with another `chat_template` or `template_kwargs`."""
        given = {name: getattr(self, name) for name in signature(type(self)).parameters}
        return type(self)(**{**given, **changes})

    @cached_property
    def context_length(self) -> int:
        """Most tokens (prompt + response) that the model accepts."""
        limit = most_tokens(self.config)
        if limit is None and self.max_context_length is None:
            raise ValueError(f"student.max_context_length: the configuration of {self.path!r} names none; set it.")
        if limit is not None and self.max_context_length is not None and self.max_context_length > limit:
            raise ValueError(
                f"student.max_context_length: {self.path!r} takes at most {limit} tokens,"
                f" got {self.max_context_length}."
            )
        return min(length for length in (limit, self.max_context_length) if length is not None)

    def load(self) -> nn.Module:
        """Load the weights, in training mode and with the model's own dropout off.

        transformers leaves a loaded model in evaluation mode and Lightning keeps that, but gradient checkpointing and
        the dropout of an adapter only work in training mode.

        Raises:
            ValueError: Files are missing or damaged, or the model is not one this project can train.
        """
        self.describe()  # a subclass that cannot be described is to fail now and not when the first checkpoint is due
        _ = self.tokenizer  # whether it fits the model can be said without the weights
        model = load_model(self.source, self.dtype, self.attn_implementation)
        switch_off_dropout(model)
        verify_no_noise(model, self.source.argument)
        if self.lora is not None:
            model = add_lora(model, self.lora)
        elif self.adapter_path is not None:
            model = load_adapter(model, self.adapter_path)
        elif causal_lm(model).dtype == torch.float16:
            raise ValueError(
                "student.dtype: all weights would be trained in float16, whose gradients overflow without the"
                " loss scaling that would hide skipped steps. Use float32 with trainer.precision=bf16-mixed, or lora."
            )
        elif causal_lm(model).dtype == torch.bfloat16:
            warnings.warn(
                "student.dtype: all weights are trained in bfloat16, where steps below about 1/256 of a weight are"
                " lost. Use float32 with trainer.precision=bf16-mixed, or lora.",
                stacklevel=2,
            )
        if isinstance(model, PeftModel):
            key_dropout(model)
        if self.gradient_checkpointing:
            _enable_gradient_checkpointing(causal_lm(model))
        verify_anatomy(model, self.source.argument, generates=True)
        allow_packing(model, self.packing, "student")
        return model.train()  # type: ignore[no-any-return]

    def shard(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Cut the model up in place: layer by layer, embedding and head together (`sharding`).

        Raises:
            ValueError: The model does not say what its layers are.
        """
        shard_causal_lm(causal_lm(model), mesh, self.source.argument)

    def hidden_states(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Final hidden states [N, H] at `batch.rows, batch.columns`: what the head turns into next-token logits."""
        packed = self.packs(model)
        seed_dropout(model, batch, packed)
        return response_states(model, batch, packed)

    def packs(self, model: nn.Module) -> bool:
        """Whether rollouts are laid end to end, so that no padding is computed."""
        return is_packed(model, self.packing)

    def head(self, model: nn.Module) -> LinearHead:
        """The head as it is now, padding rows cut off.

        Under autocast its matrix product is in low precision (at |logit| 16 to 32 bfloat16 steps are 0.125); it is the
        same for rollouts and training, so they agree.
        """
        return linear_head(model, self.tokenizer.vocab_size)

    def named_weights(self, model: nn.Module, num_rows: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as a plain model folder has them: adapters merged, tied tensors once, shards gathered."""
        return plain_weights(model, num_rows)

    def write_blank(self, model: nn.Module, folder: Path, num_rows: int) -> None:
        """Write the configuration alone: enough for vLLM to build the model and wait for its weights."""
        save_configuration(model, folder, num_rows)

    def as_base(self, model: nn.Module) -> AbstractContextManager[None] | None:
        """The model with its adapter switched off; None when all weights are trained."""
        return without_adapter(model) if isinstance(model, PeftModel) else None

    def save(self, model: nn.Module, folder: Path, *, merge_adapter: bool = True, dtype: str | None = None) -> None:
        """Write a folder that `from_pretrained` loads (`saving.save_model`).

        Raises:
            ValueError: A dtype for a bare adapter, or an unknown one.
        """
        save_model(model, self.tokenizer, folder, merge_adapter=merge_adapter, dtype=dtype)

    def describe(self) -> dict[str, Any]:
        """Class path and constructor arguments as plain values; this class under its public name.

        The chat template is its text: a file may have changed since, and no checkpoint is to name files to be read.
        """
        public = {"class_path": "opd_lightning.backends.hf.HFStudent"} if type(self) is HFStudent else {}
        description = super().describe() | public
        if "chat_template" in description["init_args"]:
            description["init_args"]["chat_template"] = self.template
        return description

    def check_same(self, description: Mapping[str, Any]) -> None:
        """Refuse another class or another adapter; warn when the model comes from another place.

        Raises:
            ValueError: The weights do not belong to this student.
        """
        super().check_same(description)
        saved, own = description["init_args"], self.describe()["init_args"]
        for name in ("lora", "adapter_path"):
            if saved.get(name) != own.get(name):
                raise ValueError(
                    f"student.{name}: the checkpoint was written with {saved.get(name)}, this run has {own.get(name)}."
                    " Use the same student."
                )
        if saved.get("path") != own.get("path"):
            warnings.warn(
                f"student.path: the checkpoint was written with {saved.get('path')!r}, this run has"
                f" {own.get('path')!r}. Fine if the folder has only moved: tokenizer, configuration and frozen weights"
                " come from there.",
                stacklevel=2,
            )


def _enable_gradient_checkpointing(lm: Any) -> None:
    # renamed in transformers 5.2x; both recompute without re-entering autograd, so frozen inputs are fine
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    try:
        enable()
    except ValueError as error:
        raise ValueError(f"student.gradient_checkpointing: {error} Set it to false.") from error
