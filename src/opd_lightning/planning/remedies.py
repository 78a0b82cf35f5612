"""Settings that would make a step smaller, each tried out on the rehearsal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from opd_lightning.backends.hf import HFStudent, HFTeacher, LoraSettings
from opd_lightning.planning.budget import Budget
from opd_lightning.planning.case import Case
from opd_lightning.planning.elsewhere import TeacherElsewhere

_FEW_CHUNK_TOKENS, _FEW_ROWS = 64, 32


@dataclass(frozen=True)
class Remedy:
    """A change of the settings.

    Attributes:
        words: As they are written in a configuration.
        case: The step with it, and with those before it where no single one is enough.
        budget: What that takes.
    """

    words: str
    case: Case
    budget: Budget


def remedies(case: Case, is_gpu: bool, make_budget: Callable[[Case], Budget]) -> list[Remedy]:
    """Each change alone that helps, best first; where none is enough, one more: several of them together.

    Args:
        case: The step that does not fit.
        is_gpu: Whether it runs on one: some settings help there only.
        make_budget: What a step takes.
    """
    start = make_budget(case)
    alone = [Remedy(words, changed, make_budget(changed)) for words, changed in _changes(case, is_gpu)]
    useful = sorted(
        (each for each in alone if each.budget.peak_gb < 0.99 * start.peak_gb), key=lambda each: each.budget.peak_gb
    )
    if not any(each.budget.fits for each in useful) and len(useful) > 1:
        useful += _together(case, is_gpu, make_budget, start)
    return useful


def _together(case: Case, is_gpu: bool, make_budget: Callable[[Case], Budget], start: Budget) -> list[Remedy]:
    """The changes that help one after the other, until it fits; nothing where it never does."""
    words: list[str] = []
    best = start
    for number in range(len(list(_changes(case, is_gpu)))):
        changes = list(_changes(case, is_gpu))
        if number >= len(changes):
            break
        word, changed = changes[number]
        taken = make_budget(changed)
        if taken.peak_gb < 0.99 * best.peak_gb:
            words, case, best = [*words, word], changed, taken
        if best.fits:
            return [Remedy(", ".join(words), case, best)]
    return []


def _changes(case: Case, is_gpu: bool) -> Iterator[tuple[str, Case]]:
    """The gentlest first: those that change speed alone, then those that change the training."""
    fewest = max(case.length, case.max_tokens // 8)
    yield f"model.max_tokens_per_micro_batch: {fewest}", replace(case, max_tokens=min(case.max_tokens, fewest))
    student, teacher = case.student, case.teacher
    if isinstance(student, HFStudent):
        yield "student.gradient_checkpointing: true", replace(case, student=_with(student, gradient_checkpointing=True))
    if case.engine_rows > _FEW_ROWS:
        yield f"engine.max_batch_size: {_FEW_ROWS}", replace(case, engine_rows=_FEW_ROWS)
    if case.objective.chunk_tokens > _FEW_CHUNK_TOKENS:
        fewer = _with(case.objective, chunk_tokens=_FEW_CHUNK_TOKENS)
        yield f"objective.chunk_tokens: {_FEW_CHUNK_TOKENS}", replace(case, objective=fewer)
    if is_gpu and case.num_copies:
        yield "EffOPD.anchor_device: cpu", replace(case, num_copies=0)
    if isinstance(teacher, HFTeacher):
        yield "teacher.dtype: bfloat16", replace(case, teacher=_with(teacher, dtype="bfloat16"))
        if teacher.sharded is False:  # helps where several devices share the student
            yield "teacher.sharded: null", replace(case, teacher=_with(teacher, sharded=None))
        if is_gpu and teacher.quantization_config is None:
            offloaded = _with(teacher, offload=True, sharded=None)
            words = "teacher.offload: true" + (", teacher.sharded: null" if teacher.sharded else "")
            yield words, replace(case, teacher=offloaded)
    if isinstance(student, HFStudent) and not student.has_adapter:
        lora = _with(student, lora=LoraSettings(), dtype="bfloat16" if case.in_bfloat16 else student.dtype)
        words = "student.lora: {r: 16}" + (", student.dtype: bfloat16" if case.in_bfloat16 else "")
        yield words, replace(case, student=lora)
    if case.engine_rows and is_gpu:
        yield "rollouts from servers (VLLMServerEngine)", replace(case, engine_rows=0)
    if isinstance(teacher, HFTeacher) and is_gpu:
        elsewhere = TeacherElsewhere(teacher.offer, student.tokenizer.vocab_size)
        yield "a teacher on servers (VLLMServerTeacher)", replace(case, teacher=elsewhere)


def _with(settings: Any, **changes: Any) -> Any:
    changed = copy.copy(settings)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
