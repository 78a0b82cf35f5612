"""`CrossTokenizerTeacher`: a model with a tokenizer of its own reads the student's text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from opd_lightning.backends.hf.loading import load_config, load_eos_ids, load_tokenizer, most_tokens
from opd_lightning.backends.hf.preflight import Compatibility
from opd_lightning.backends.hf.reading import Reader, Reading, Unreadable, units_of
from opd_lightning.backends.hf.teacher import HFTeacher
from opd_lightning.backends.hf.tokenizer import HFTokenizer, check_vocabulary_rows
from opd_lightning.interfaces import MicroBatch, Rollout, ScoreRequest, Student, TeacherScores
from opd_lightning.objectives import JointScores
from opd_lightning.objectives.joint_scores import SharedTokens
from opd_lightning.rollouts.batching import collate

_PROBES = ("Let x = 3.\n\n  So  2x+1 = 7, and\tit's done.", "A naïve façade — “123,456.78”", "日本語 and 🙂 ÀÉÎ")


class CrossTokenizerTeacher(HFTeacher):
    """A frozen model of another family: it is asked in its own template and reads the student's text in its own tokens.

    Needs an objective that compares units of text (`SimCT`). A token of the student that is no text in the middle of an
    answer, bytes that are no UTF-8, or text that the teacher's tokenizer changes cannot be read; what an answer cut at
    the length limit leaves of a character is left out.

    Args:
        path: Local folder or hub id.
        chat_template: Replaces the teacher's own: its text, or a file that holds it.
        template_kwargs: Extra variables of the template.
        closing_tokens: What closes a response, as the student's and the teacher's vocabulary write it; None takes the
            tokens that each tokenizer names.
        skip_unaligned: Leave answers that cannot be read out of the loss, instead of stopping.
        dtype: As in `HFTeacher`, and so are the others.
        attn_implementation: Attention kernel.
        quantization_config: Passed to transformers.
        offload: Keep the body in CPU memory between steps.
        float32_head: Use a float32 copy of the head.
        trust_remote_code: Whether code that comes with the model may run.
        revision: Branch, tag or commit on the hub.
        sharded: Under FSDP2, whether the body is cut up over processes.

    Raises:
        ValueError: The settings contradict each other.
    """

    def __init__(
        self,
        path: str,
        chat_template: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        closing_tokens: Sequence[str] | None = None,
        skip_unaligned: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        quantization_config: dict[str, Any] | None = None,
        offload: bool = False,
        float32_head: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        sharded: bool | None = None,
    ) -> None:
        super().__init__(
            path,
            dtype,
            attn_implementation,
            quantization_config,
            offload=offload,
            float32_head=float32_head,
            trust_remote_code=trust_remote_code,
            revision=revision,
            sharded=sharded,
        )
        if closing_tokens is not None and len(closing_tokens) != 2:
            raise ValueError(
                f"teacher.closing_tokens: expected two, the student's and the teacher's, got {list(closing_tokens)}."
            )
        self._chat_template = chat_template
        self.template_kwargs = template_kwargs
        self.closing_tokens = closing_tokens
        self.skip_unaligned = skip_unaligned
        self._reader: Reader | None = None
        self._has_told = False

    @property
    @override
    def offer(self) -> ScoreRequest:
        return ScoreRequest(joint_units=True)

    @property
    @override
    def context_length(self) -> None:
        """Not known in the student's tokens; a text that is too long is refused when it comes."""
        return None

    @override
    def check(self, request: ScoreRequest) -> None:
        """Refuse objectives that compare tokens.

        Raises:
            ValueError: It does.
        """
        super().check(request)
        if not request.joint_units:
            raise ValueError(
                "objective: CrossTokenizerTeacher scores units of text, not the student's tokens. Set objective: SimCT,"
                " or choose a teacher of the student's family (HFTeacher)."
            )

    @override
    def preflight(self, student: Student) -> None:
        """Read both tokenizers and the teacher's configuration, and no weights.

        Raises:
            ValueError: One of the tokenizers cannot be read across, or the teacher's changes text.
        """
        config = load_config(self.source)
        own = HFTokenizer(
            load_tokenizer(self.source),
            load_eos_ids(self.source, config),
            chat_template=self._chat_template,
            template_kwargs=self.template_kwargs,
            role="teacher",
        )
        check_vocabulary_rows(self.source, config, own)
        self._compatibility = Compatibility(own.vocab_size, most_tokens(config))
        self._reader = Reader(student.tokenizer, own, self.closing_tokens)
        for probe in _PROBES:
            try:
                self._reader.read(probe)
            except Unreadable as reason:
                raise ValueError(
                    f"teacher.path: the tokenizer of {self.source.path!r} changes text, so student and teacher cannot"
                    f" be aligned: {reason}. Choose a teacher whose tokenizer keeps text as it is."
                ) from None

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        if self._reader is None:
            self.preflight(student)
        super().setup(student, model, device)

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> JointScores:
        assert self._reader is not None, "call setup before score"
        readings = [self._reading(rollout) for rollout in batch.rollouts]
        own = collate([reading.rollout for reading in readings], self._reader.teacher.pad_id)
        scores: TeacherScores = super().score(own.to(self._device), replace(request, joint_units=False))
        units = units_of(readings, self._reader).to(self._device)
        shared = SharedTokens(*(ids.to(self._device) for ids in self._reader.shared_ids))
        return JointScores(batch.tokens.ids.to(self._device), scores, units, shared)

    @override
    def as_answerer(self, student: Student) -> Student:
        raise ValueError(
            "model.teacher: CrossTokenizerTeacher would answer in other tokens than the student's. Put the model in"
            " model.student, set role: student, and train on its texts with data.source.reencode: true."
        )

    @override
    def as_student(self) -> None:
        """Not in the student's tokens."""

    @override
    def is_here(self, is_cut_up: bool) -> bool:
        return False

    def _reading(self, rollout: Rollout) -> Reading:
        assert self._reader is not None
        try:
            return self._reader.align(rollout)
        except Unreadable as reason:
            message = (
                f"the answer to problem {rollout.problem.uid!r} cannot be aligned with {self.source.path!r}: {reason}"
            )
            if not self.skip_unaligned:
                raise ValueError(
                    f"teacher.path: {message}. Set teacher.skip_unaligned: true to leave such answers out of the loss."
                ) from None
            if not self._has_told:
                warnings.warn(f"teacher.path: {message}; left out of the loss, as others will be.", stacklevel=2)
            self._has_told = True
            return self._reader.nothing(rollout)
