"""`HFTeacher`: a frozen model that scores the student's tokens in this process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from opd_lightning.backends.hf.anatomy import body_states, linear_head, verify_anatomy
from opd_lightning.backends.hf.answerer import make_answerer
from opd_lightning.backends.hf.loading import ModelSource, check_dtype, check_quantization, load_model, load_tokenizer
from opd_lightning.backends.hf.packing import allow_packing, is_packed, response_states
from opd_lightning.backends.hf.preflight import Compatibility, check_compatibility
from opd_lightning.backends.hf.sharding import shard_frozen_body
from opd_lightning.backends.hf.student import HFStudent
from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.distributed import largest, mesh_of, rank
from opd_lightning.interfaces import LinearHead, MicroBatch, ScoreRequest, Student, Teacher, TeacherScores
from opd_lightning.objectives import HiddenScores

EVERYTHING = ScoreRequest(top_k=sys.maxsize, arbitrary_ids=True, full_vocabulary=True)
_CANNOT_SHARD = (
    "teacher.sharded: weights that are quantised, or visit the device from CPU memory (offload, paged), are not cut up"
    " over processes. Leave one of the two out."
)
_CANNOT_MOVE = "teacher.offload: quantised weights cannot move between devices; leave one of the two out."


class HFTeacher(Teacher):
    """A frozen causal language model from a local folder or the hub.

    It runs in its own dtype whatever autocast is in force, and answers any request: the hidden states of the response
    tokens are kept, and the head turns them into log-probabilities for what is asked, in float32, over the ids it
    shares with the student.

    Args:
        path: Local folder or hub id.
        dtype: Dtype of the weights; "auto" is the one they are stored in.
        attn_implementation: Attention kernel, for example "sdpa" or "flash_attention_2"; None lets transformers choose.
        quantization_config: For transformers: ``{"quant_method": "bitsandbytes", "load_in_4bit": true}``, for example;
            `opd-lightning diagnose` then says what it changes.
        offload: Keep the body in (pinned) CPU memory and bring it to the device once per step, for all micro-batches
            together: for one transfer per step its memory (`setup` prints how much) is free in the student's passes.
        float32_head: Use a float32 copy of the head. A bfloat16 head rounds logits between 16 and 32 to steps of 0.125,
            as large as the differences late in training; costs memory and a slower matrix product.
        sharded: Under FSDP2 each process holds its share of the body (all but the head) and the layers are gathered
            while they compute, for all micro-batches of a step at once. None: where it is neither quantised nor
            offloaded; false: whole on each process; true refuses to train without FSDP2.
        trust_remote_code: Whether code that comes with the model may run.
        revision: Branch, tag or commit on the hub.
        packing: Lay the rollouts of a micro-batch end to end instead of padding them, as the student's `packing`.

    Raises:
        ValueError: The settings contradict each other.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        quantization_config: dict[str, Any] | None = None,
        offload: bool = False,
        float32_head: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        packing: bool | None = None,
        sharded: bool | None = None,
    ) -> None:
        check_dtype("teacher", dtype)
        check_quantization("teacher", quantization_config)
        if offload and quantization_config is not None:
            raise ValueError(_CANNOT_MOVE)
        if sharded and (offload or quantization_config is not None):
            raise ValueError(_CANNOT_SHARD)
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.quantization_config: Mapping[str, Any] | None = quantization_config
        self.offload = offload
        self.float32_head = float32_head
        self.packing = packing
        self.sharded = sharded
        self.source = ModelSource(path, "teacher", revision, trust_remote_code)
        self._compatibility: Compatibility | None = None
        self._model: Any = None
        self._head: LinearHead | None = None
        self._visitor: _VisitingWeights | None = None
        self._mesh: DeviceMesh | None = None  # of those who hold a share each
        self._device = torch.device("cpu")
        self._template_kwargs: dict[str, Any] | None = None  # the student's: both are asked in the same way

    @property
    def context_length(self) -> int | None:
        """Most tokens (prompt + response) it accepts; None when its configuration names none. Known after preflight."""
        assert self._compatibility is not None, "call preflight or setup first"
        return self._compatibility.context_length

    @property
    def offer(self) -> ScoreRequest:
        """Everything can be asked."""
        return EVERYTHING

    @property
    def is_shared(self) -> bool:
        """Whether its body is cut up wherever the student is (FSDP2)."""
        return self.sharded is not False and not self.offload and self.quantization_config is None

    def is_here(self, is_cut_up: bool) -> bool:
        """Whether it rests whole on the device, not quantised."""
        return not self.offload and self.quantization_config is None and not (is_cut_up and self.is_shared)

    @property
    def chat_template(self) -> str | None:
        """Text of its own chat template; None where it has none."""
        return HFTokenizer(load_tokenizer(self.source), role=self.source.role).template

    def preflight(self, student: Student) -> None:
        """Check tokenizer and configuration against the student's, reading no weights.

        Raises:
            ValueError: They do not speak the same token ids (`check_compatibility`).
        """
        self._compatibility = check_compatibility(student, self.source)

    def page(self) -> None:
        """As with `offload`.

        Raises:
            ValueError: It is quantised, or to be cut up.
        """
        if self.quantization_config is not None:
            raise ValueError(_CANNOT_MOVE)
        if self.sharded:
            raise ValueError(_CANNOT_SHARD)
        self.offload = True

    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Load the teacher, once."""
        if self._compatibility is None:
            self.preflight(student)
        assert self._compatibility is not None
        if self._model is not None:
            return
        self._device = device
        if isinstance(student.tokenizer, HFTokenizer):
            self._template_kwargs = student.tokenizer.template_kwargs
        loaded = load_model(self.source, self.dtype, self.attn_implementation, self.quantization_config, device)
        loaded.requires_grad_(False).eval()
        verify_anatomy(loaded, self.source.argument, generates=False)
        allow_packing(loaded, self.packing, "teacher")
        self._model = loaded
        head = linear_head(loaded, self._compatibility.vocab_size)
        if self.offload:
            self._visitor = _VisitingWeights(loaded.get_decoder(), device)
        elif self.quantization_config is None:
            self._mesh = mesh_of(model) if self.is_shared else None
            if self._mesh is None:
                loaded.to(device)
                head = linear_head(loaded, self._compatibility.vocab_size)
        is_elsewhere = self.offload or self._mesh is not None
        if is_elsewhere or self.float32_head:  # a tied head would go away with the embedding, or change its dtype
            dtype = torch.float32 if self.float32_head else head.weight.dtype
            bias = None if head.bias is None else head.bias.detach().to(device, dtype, copy=True)
            head = replace(head, weight=head.weight.detach().to(device, dtype, copy=True), bias=bias)
        self._head = head
        if self._mesh is not None:
            shard_frozen_body(loaded, self._mesh, self.source.argument)
        if self._visitor is not None and rank() == 0:
            print(_words_of_rest(self.source.path, self._visitor, head, device), file=sys.stderr)

    def in_full(self) -> HFTeacher:
        """The same teacher, not loaded, with weights that are not quantised."""
        whole = copy.copy(self)
        whole.quantization_config = None
        whole.close()
        return whole

    def as_answerer(self, student: Student) -> Student:
        """The model in a student's place.

        Raises:
            ValueError: It does not speak the student's token ids, or is quantised.
        """
        if self.quantization_config is not None:
            raise ValueError(
                "teacher.quantization_config: a quantised teacher scores, but does not answer here. Leave it out (vLLM"
                " quantises by itself: engine.engine_args.quantization)."
            )
        self.preflight(student)
        return make_answerer(self.source, student, self.dtype, self.attn_implementation)

    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        """Score the response tokens of one micro-batch."""
        assert self._compatibility is not None and self._model is not None and self._head is not None, "call setup"
        limit, length = self._compatibility.context_length, batch.input_ids.shape[1]
        if limit is not None and length > limit:
            raise ValueError(
                f"teacher.path: a rollout of {length} tokens is longer than the context of {self.source.path!r},"
                f" {limit} tokens. Set student.max_context_length: {limit}."
            )
        batch = batch.to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False), self._body_on_device():
            hidden = response_states(self._model, batch, is_packed(self._model, self.packing))
        return HiddenScores(hidden, batch.tokens.ids, self._head, request.temperature)

    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        """Score the micro-batches of one step in order.

        With `offload` all of them while the body is on the device, and where processes share the body all of them
        together, in the call: who has fewer micro-batches keeps pace with the others.
        """
        if self._visitor is None and self._mesh is None:
            return super().score_all(batches, request)
        with self._keeping_pace(len(batches)), self._body_on_device():
            scores = [self.score(batch, request) for batch in batches]
        return _one_by_one(scores)

    @contextmanager
    def _keeping_pace(self, num_passes: int) -> Iterator[None]:
        """Around so many passes of a body that is cut up: afterwards it has run as often as on the other processes."""
        num_missing = 0 if self._mesh is None else largest(num_passes, self._device) - num_passes
        yield
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        for _ in range(num_missing):
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                body_states(self._model, token, torch.ones_like(token), token)

    def as_student(self) -> tuple[Student, nn.Module] | None:
        """The very weights that score; None where they are not on the device between two steps, or not all of them."""
        if self._model is None or self.offload or self._mesh is not None:
            return None
        settings: dict[str, Any] = {"trust_remote_code": self.source.trust_remote_code, "packing": self.packing}
        settings |= {"revision": self.source.revision, "template_kwargs": self._template_kwargs}
        return HFStudent(self.source.path, **settings), self._model

    def close(self) -> None:
        """Let go of the weights."""
        self._model = self._head = self._visitor = self._mesh = None

    def _body_on_device(self) -> AbstractContextManager[None]:
        return nullcontext() if self._visitor is None or self._visitor.is_there else self._visitor.on_device()


def _words_of_rest(path: str, body: _VisitingWeights, head: LinearHead, device: torch.device) -> str:
    """What offload frees, in bytes."""
    if device.type == "cpu":
        return f"teacher.offload: the device is the CPU, so nothing is freed; the head of {path} is there twice."
    staying = sum(each.numel() * each.element_size() for each in (head.weight, head.bias) if each is not None)
    return (
        f"teacher.offload: {body.num_bytes:,} bytes of {path} rest in CPU memory and are on {device} while a step is"
        f" scored; its head, {staying:,} bytes, stays there."
    )


def _one_by_one(scores: list[TeacherScores]) -> Iterator[TeacherScores]:
    while scores:  # let go of what has been used
        yield scores.pop(0)


class _VisitingWeights:
    """Frozen weights that rest in CPU memory and visit the device; the way back costs nothing, as nothing changed.

    Attributes:
        num_bytes: That rest.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.is_there = False
        self._device = device
        self._places = [
            (part, name, tensor)
            for part in module.modules()
            for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        ]
        stored = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for _, _, tensor in self._places}
        self.num_bytes = sum(stored.values())
        if device.type == "cuda":
            for _, _, tensor in self._places:
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        try:
            for part, name, tensor in self._places:
                visitor = tensor.to(self._device, non_blocking=True)
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(part, name, nn.Parameter(visitor, requires_grad=False) if is_parameter else visitor)
            self.is_there = True
            yield
        finally:
            self.is_there = False
            for part, name, tensor in self._places:
                setattr(part, name, tensor)
