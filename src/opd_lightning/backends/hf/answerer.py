"""A teacher's model in a student's place: it answers, and is never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.backends.hf.anatomy import body_states, linear_head, verify_anatomy
from opd_lightning.backends.hf.loading import ModelSource, load_config, load_model, most_tokens
from opd_lightning.backends.hf.saving import plain_weights, save_configuration
from opd_lightning.interfaces import LinearHead, MicroBatch, Student, Tokenizer


def make_answerer(source: ModelSource, student: Student, dtype: str, attn_implementation: str | None) -> Student:
    """A frozen model that engines generate with as if it were the student.

    Prompts are rendered by the student's tokenizer, and what closes its responses closes these: they are answers to
    what the student will be asked.

    Args:
        source: Where the model comes from; it speaks the student's token ids.
        student: Gives the tokenizer.
        dtype: Dtype of the weights; "auto" is the one they are stored in.
        attn_implementation: Attention kernel; None lets transformers choose.
    """
    return _HFAnswerer(source, student, dtype, attn_implementation)


class _HFAnswerer(Student):
    def __init__(self, source: ModelSource, student: Student, dtype: str, attn_implementation: str | None) -> None:
        self._source = source
        self._student = student
        self._dtype = dtype
        self._attn_implementation = attn_implementation

    @property
    @override
    def tokenizer(self) -> Tokenizer:
        return self._student.tokenizer

    @property
    @override
    def context_length(self) -> int:
        """Most tokens that both take."""
        own, limit = most_tokens(load_config(self._source)), self._student.context_length
        return limit if own is None else min(own, limit)

    @override
    def load(self) -> nn.Module:
        """Load the weights, frozen and in evaluation mode."""
        model: nn.Module = load_model(self._source, self._dtype, self._attn_implementation)
        verify_anatomy(model, self._source.argument, generates=True)
        return model.requires_grad_(False).eval()

    @override
    def hidden_states(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        states = body_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
        return states[batch.rows, batch.columns]

    @override
    def head(self, model: nn.Module) -> LinearHead:
        return linear_head(model, self.tokenizer.vocab_size)

    @override
    def named_weights(self, model: nn.Module, num_rows: int | None = None) -> Any:
        return plain_weights(model, num_rows)

    @override
    def write_blank(self, model: nn.Module, folder: Path, num_rows: int) -> None:
        save_configuration(model, folder, num_rows)

    @override
    def save(self, model: nn.Module, folder: Path, *, merge_adapter: bool = True, dtype: str | None = None) -> None:
        raise AssertionError("what answers is not saved: it is where it came from")

    @override
    def describe(self) -> dict[str, Any]:
        """Where the model comes from, in plain values."""
        arguments = {"path": self._source.path, "dtype": self._dtype, "revision": self._source.revision}
        return {"class_path": "opd_lightning.backends.hf.HFTeacher", "init_args": arguments}
