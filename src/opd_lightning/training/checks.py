"""Do objective, teacher, data and trainer fit together, and do they fit the checkpoint to be resumed?

Asked as early as possible, most of it before any weight is loaded. Knows the settings only; what a teacher's tokenizer
says is the teacher's own `preflight`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from opd_lightning.interfaces import Teacher
from opd_lightning.objectives import Objective
from opd_lightning.training.datamodule import OPDDataModule


def check_fit(
    *,
    teacher: Teacher | None,
    objective: Objective,
    data: OPDDataModule,
    trainer: Trainer,
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
    if trainer.limit_train_batches not in (None, 1.0) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.limit_train_batches: the prompt stream goes on where it stopped, so passes would differ in length"
            " and validations be lost. Set trainer.max_steps and trainer.val_check_interval instead."
        )
    if updates_per_batch > 1 and objective.effective_importance == "none":
        warnings.warn(
            f"model.updates_per_batch={updates_per_batch}: the later updates train on rollouts of older weights, and"
            " this objective does not correct for that (objective.importance).",
            stacklevel=2,
        )
    if data.ahead and objective.support == "sampled_token" and objective.effective_importance == "none":
        warnings.warn(
            "data.generate_ahead: rollouts come from weights one step older, and this objective does not correct for"
            " that. Set objective.importance: truncated.",
            stacklevel=2,
        )
    objective.check_sampling(data.sampling)
    teacher.check(objective.request())
    if data.prompts_per_step % trainer.world_size:
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} cannot be split evenly over {trainer.world_size} processes."
            f" Choose a multiple of {trainer.world_size}."
        )
    num_rollouts = data.prompts_per_step // trainer.world_size * data.rollouts_per_prompt
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
    assert data.stream is not None
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > len(data.stream) and trainer.check_val_every_n_epoch is not None:
        raise ValueError(
            f"trainer.val_check_interval={interval}: one pass over the data has only {len(data.stream)} steps. Set"
            " trainer.check_val_every_n_epoch: null, which counts steps across passes."
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


def check_engine_context(data: OPDDataModule) -> None:
    """Refuse rollouts that may become longer than the engine takes; servers say only now how much that is.

    Raises:
        ValueError: They may.
    """
    longest, limit = data.longest_prompt + data.sampling.max_new_tokens, data.engine.context_length
    if limit is not None and longest > limit:
        raise ValueError(
            f"data.engine: it takes at most {limit} tokens, but the longest prompt has {data.longest_prompt} and"
            f" sampling.max_new_tokens is {data.sampling.max_new_tokens}. Start the servers with --max-model-len"
            f" {longest}, or set data.max_prompt_tokens and sampling.max_new_tokens so that both fit."
        )


def check_optimizer(make_optimizer: OptimizerCallable, make_lr_scheduler: LRSchedulerCallable | None) -> dict[str, Any]:
    """Build optimiser and scheduler for a single number, and say what they are.

    Returns:
        Their class names and the optimiser's settings, for `check_resume`.

    Raises:
        ValueError: One of them refuses its settings, or the scheduler cannot be stepped without a metric.
    """
    try:
        optimizer = make_optimizer([nn.Parameter(torch.zeros(1, 1))])
    except ValueError as error:
        raise ValueError(f"model.optimizer: {error}") from error
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    try:
        scheduler = make_lr_scheduler(optimizer) if make_lr_scheduler is not None else None
    except ValueError as error:
        raise ValueError(f"model.lr_scheduler: {error}") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler: ReduceLROnPlateau waits for a metric, but schedulers are stepped after every optimiser"
            " step. Use another one, such as WarmupDecay."
        )
    return {
        "model.optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,  # EffOPDOptimizer wraps one
        "model.optimizer.init_args": settings,
        "model.lr_scheduler": None if scheduler is None else type(scheduler).__name__,
    }


def check_resume(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse settings that the state in a checkpoint does not fit, and warn about those that it overrides.

    Args:
        saved: Settings of the run that wrote the checkpoint, by name.
        current: The same of this run.

    Raises:
        ValueError: They differ.
    """
    for name, value in current.items():
        if name not in saved:
            warnings.warn(f"{name}: an older checkpoint, which does not say; not compared.", stacklevel=2)
        elif isinstance(value, dict):
            kept = {key: saved[name][key] for key in value if key in saved[name] and saved[name][key] != value[key]}
            if kept:
                warnings.warn(
                    f"{name}: a resumed run keeps the checkpoint's settings; {kept} stay, and this run's are ignored."
                    " To change them, start a new run from the checkpoint's weights.",
                    stacklevel=2,
                )
        elif saved[name] != value:
            raise ValueError(
                f"{name}: the checkpoint was written with {saved[name]}, this run has {value}. Resume with the same, or"
                " start a new run from the checkpoint's weights (opd-lightning export, then student.path)."
            )
