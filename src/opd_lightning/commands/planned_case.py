"""From the settings of a `fit` to what `planning` rehearses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.backends.hf.bare_tokenizer import bare_tokenizer, has_tokenizer
from opd_lightning.backends.hf.preflight import Compatibility
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.backends.vllm.server import VLLMServerEngine, VLLMServerTeacher
from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.interfaces import Problem, Rollout, Teacher
from opd_lightning.planning import Case, TeacherElsewhere
from opd_lightning.rollouts.problem_sets import read_problems
from opd_lightning.rollouts.stored import Stored
from opd_lightning.teachers import BaseModelTeacher, StoredTeacher
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.metrics import add_metrics
from opd_lightning.training.module import OPDModule


@dataclass(frozen=True)
class Surroundings:
    """What the trainer's settings say about a step.

    Attributes:
        precision: As the trainer takes it.
        num_devices: Processes, with a device each.
        callbacks: Of the run.
    """

    precision: str
    num_devices: int
    callbacks: Sequence[Callback]


def case_of(
    module: OPDModule,
    data: OPDDataModule,
    surroundings: Surroundings,
    prompt_tokens: int,
    response_tokens: int | None = None,
) -> Case:
    """The step of one process.

    Args:
        module: Student, teacher, objective and optimiser.
        data: Engine and sampling.
        surroundings: Precision, processes, callbacks.
        prompt_tokens: Of the longest prompt.
        response_tokens: Of an answer; None for as many as it may have.

    Raises:
        ValueError: The student is none whose shapes are known.
    """
    student = planned_student(module)
    request = module.objective.request()
    teacher = None
    if module.teacher is not None:
        request = add_metrics(request, module.teacher.offer, module.facts_k)
        teacher = _planned_teacher(module.teacher, student)
    generates_here = not isinstance(data.engine, VLLMColocatedEngine | VLLMServerEngine)
    rows = (data.engine.max_batch_size if isinstance(data.engine, HFEngine) else 1) if generates_here else 0
    return Case(
        student=student,
        make_optimizer=module.make_optimizer,
        objective=module.objective,
        teacher=teacher,
        request=request,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens or data.sampling.max_new_tokens,
        num_rollouts=-(-data.prompts_per_step // surroundings.num_devices) * data.rollouts_per_prompt,
        rollouts_per_prompt=data.rollouts_per_prompt,
        max_tokens=module.max_tokens_per_micro_batch,
        facts_k=module.facts_k,
        counts_alike=module.token_weighting is None,
        in_bfloat16=surroundings.precision == "bf16-mixed",
        sampling=data.sampling,
        engine_rows=0 if isinstance(data.source, Stored) else rows,
        num_copies=sum(isinstance(each, EffOPD) for each in surroundings.callbacks),
        extras=_extras_of(module),
    )


def planned_student(module: OPDModule) -> HFStudent:
    """The student; one without files of a tokenizer gets a bare one.

    Raises:
        ValueError: It is of another kind.
    """
    if not isinstance(module.spec, HFStudent):
        raise ValueError(
            f"model.student: plan knows the shapes of an HFStudent; got {type(module.spec).__name__}. Fit it for three"
            " steps with model.measure_memory: true, which logs train/memory_gb/*."
        )
    student = copy.copy(module.spec)
    if not has_tokenizer(student.source):
        student.__dict__["tokenizer"] = bare_tokenizer(student.source)
    return student


def longest_prompt(student: HFStudent, data: OPDDataModule) -> int:
    """Tokens of the longest training prompt.

    Raises:
        ValueError: Nobody can know them.
    """
    if data.max_prompt_tokens is not None:
        return data.max_prompt_tokens
    if not has_tokenizer(student.source):
        raise ValueError(
            f"prompt_tokens: {student.path!r} has no tokenizer, so nobody knows how long the prompts are. Set"
            " --prompt_tokens, the tokens of the longest."
        )
    return read_problems(
        data.task,
        "train",
        student.tokenizer,
        data.sampling,
        setting="data.sampling",
        context=student.context_length,
        max_prompt_tokens=None,
        drop=data.drop_long_prompts,
    )[1]


def _planned_teacher(teacher: Teacher, student: HFStudent) -> Teacher:
    if isinstance(teacher, BaseModelTeacher):
        return teacher
    if not isinstance(teacher, HFTeacher):
        is_here = not isinstance(teacher, VLLMServerTeacher | StoredTeacher)
        return TeacherElsewhere(
            teacher.offer, student.tokenizer.vocab_size, type(teacher).__name__ if is_here else None
        )
    planned = copy.copy(teacher)
    if not (has_tokenizer(teacher.source) and has_tokenizer(student.source)):
        vocab_size = min(student.tokenizer.vocab_size, bare_tokenizer(teacher.source).vocab_size)
        planned._compatibility = Compatibility(vocab_size, None)
    return planned


def _extras_of(module: OPDModule) -> tuple[str, ...]:
    """Names of what the objective attaches to the tokens of a rollout."""
    ids = torch.zeros(1, dtype=torch.int64)
    rollout = Rollout(Problem("", ()), ids, ids, torch.zeros(1), finished=True, seed=0, reward=0.0)
    ((shaped,),) = module.objective.shape([[rollout]])
    return tuple(shaped.extras)
