"""Do objective, teacher, data and trainer fit together? Asked before any weight is loaded.

Knows the settings only; what a teacher's tokenizer says is the teacher's own `preflight`.
"""

from __future__ import annotations

from opd_lightning.datamodule import OPDDataModule
from opd_lightning.interfaces import Teacher
from opd_lightning.objectives import Objective


def check_fit(
    *,
    teacher: Teacher | None,
    objective: Objective,
    data: OPDDataModule,
    precision: str,
    world_size: int,
    updates_per_batch: int,
    max_tokens_per_micro_batch: int,
) -> None:
    """Refuse settings that cannot train.

    Raises:
        ValueError: One of them; the message names it, says what was expected and what to do.
    """
    if teacher is None:
        raise ValueError(
            "model.teacher: `fit` needs a teacher, for example {class_path: HFTeacher, init_args: {path: ...}}."
        )
    if precision.startswith("16"):
        raise ValueError(
            f"trainer.precision={precision!r}: fp16 needs loss scaling, which would hide skipped steps. Use bf16-mixed,"
            " or 32-true."
        )
    objective.check_sampling(data.sampling)
    teacher.check(objective.request())
    num_rollouts = data.prompts_per_step // world_size * data.rollouts_per_prompt
    if num_rollouts < updates_per_batch:
        raise ValueError(
            f"model.updates_per_batch={updates_per_batch}: a process has only {num_rollouts} rollouts per step. Lower"
            " it, or raise data.prompts_per_step or data.rollouts_per_prompt."
        )
    longest = data.longest_prompt + data.sampling.max_new_tokens
    if max_tokens_per_micro_batch < longest:
        raise ValueError(
            f"model.max_tokens_per_micro_batch={max_tokens_per_micro_batch} cannot hold one rollout: the longest prompt"
            f" has {data.longest_prompt} tokens and sampling.max_new_tokens is {data.sampling.max_new_tokens}. Raise"
            f" it to at least {longest}."
        )


def check_teacher_context(teacher: Teacher, data: OPDDataModule) -> None:
    """Refuse rollouts that may become longer than the teacher can read.

    Raises:
        ValueError: They may.
    """
    longest = data.longest_prompt + data.sampling.max_new_tokens
    if teacher.context_length is not None and longest > teacher.context_length:
        raise ValueError(
            f"model.teacher: it reads at most {teacher.context_length} tokens, but the longest prompt has"
            f" {data.longest_prompt} and sampling.max_new_tokens is {data.sampling.max_new_tokens}. Set"
            " data.max_prompt_tokens and sampling.max_new_tokens so that both fit."
        )
