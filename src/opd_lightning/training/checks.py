"""Do objective, teacher, data and trainer fit together, and do they fit the checkpoint to be resumed?

Asked as early as possible, most of it before any weight is loaded. Knows the settings only; what a teacher's tokenizer
says is the teacher's own `preflight`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from opd_lightning.interfaces import Objective, ScoreRequest, Student, Teacher, TokenWeighting
from opd_lightning.objectives import SampledTokenObjective, known_facts
from opd_lightning.rollouts.prompt_limits import check_context
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
    request = objective.request()
    if teacher is None and request is not None:
        raise ValueError(
            f"model.teacher: {type(objective).__name__} needs a teacher, for example"
            " {class_path: HFTeacher, init_args: {path: ...}}."
        )
    if trainer.limit_train_batches not in (None, 1.0) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.limit_train_batches: the prompt stream goes on where it stopped, so passes would differ in length"
            " and validations be lost. Set trainer.max_steps and trainer.val_check_interval instead."
        )
    stale = f"model.updates_per_batch={updates_per_batch}" if updates_per_batch > 1 else ""
    stale = stale or (f"data.source: {type(data.source).__name__}" if data.source.staleness else "")
    if stale and isinstance(objective, SampledTokenObjective) and objective.importance is None:
        warnings.warn(
            f"{stale}: some rollouts come from older weights, and this objective does not correct for that. Set"
            " objective.importance, for example Truncated.",
            stacklevel=2,
        )
    if objective.needs_rollout_log_probs and not data.source.knows_log_probs(data.sampling):
        raise ValueError(
            f"model.objective: {type(objective).__name__} needs the log-probabilities that rollouts were drawn with,"
            f" but {type(data.source).__name__} with {type(data.engine).__name__} does not know them for this"
            " data.sampling. Set sampling.top_p to 1 and sampling.top_k to 0, or objective.importance: null."
        )
    if data.selector.needs_rewards and not data.task.is_graded:
        raise ValueError(
            f"data.selector: {type(data.selector).__name__} learns from rewards, but {type(data.task).__name__} has no"
            " answers to mark. Use Shuffled, or a task that defines grade."
        )
    objective.check_sampling(data.sampling)
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


def check_teacher(teacher: Teacher, student: Student, data: OPDDataModule) -> None:
    """Make sure that the teacher speaks the student's tokens and can read its longest rollout; no weights are read.

    Raises:
        ValueError: It does not, or cannot.
    """
    teacher.preflight(student)
    check_context("model.teacher: it reads", teacher.context_length, data.longest_prompt, data.sampling)


def check_weighting(weighting: TokenWeighting | None, answers: ScoreRequest | None, facts_k: int) -> None:
    """Refuse a token weighting that reads what this run cannot know.

    Args:
        weighting: None when all tokens weigh the same.
        answers: What the teacher is asked for; None without a teacher.
        facts_k: Size of the top-k lists of the facts.

    Raises:
        ValueError: It does.
    """
    known = known_facts(answers, facts_k)
    if weighting is not None and (unknown := [name for name in weighting.reads if name not in known]):
        gives = f"which gives {answers}" if answers is not None else "there is none"
        raise ValueError(
            f"model.token_weighting: {type(weighting).__name__} reads {', '.join(unknown)}, which this run cannot know"
            f" from its teacher ({gives}). Known are: {', '.join(known)}."
        )


def check_optimizer(make_optimizer: OptimizerCallable, make_lr_scheduler: LRSchedulerCallable | None) -> dict[str, Any]:
    """Build optimiser and scheduler for a single number, and say what they are.

    Returns:
        Their class names and the optimiser's settings, for `check_resume`.

    Raises:
        ValueError: One of them refuses its settings, the optimiser needs a closure, or the scheduler cannot be stepped
            without a metric.
    """
    parameter = nn.Parameter(torch.zeros(1, 1))
    try:
        optimizer = make_optimizer([parameter])
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.optimizer: {error}") from error
    inner = getattr(optimizer, "optimizer", optimizer)  # EffOPDOptimizer wraps one
    closure = inspect.signature(inner.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"model.optimizer: {type(inner).__name__} computes the loss several times per step (its step needs a"
            " closure), but a step here has one gradient. Use an optimiser that needs gradients only, such as"
            " torch.optim.AdamW."
        )
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    inner = getattr(optimizer, "optimizer", optimizer)  # EffOPDOptimizer wraps one
    parameter.grad = torch.zeros_like(parameter)
    name = "model.lr_scheduler"
    try:  # with one step, since some mistakes show only then: LBFGS wants a closure, T_max=0 is divided by
        scheduler = make_lr_scheduler(optimizer) if make_lr_scheduler is not None else None
        name = "model.optimizer"
        inner.step()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            name = "model.lr_scheduler"
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # it watches for the wrapper's step
                scheduler.step()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name}: with these settings no step can be made: {error}.") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler: ReduceLROnPlateau waits for a metric, but schedulers are stepped after every optimiser"
            " step. Use another one, such as WarmupDecay."
        )
    return {
        "model.optimizer": type(inner).__name__,
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
