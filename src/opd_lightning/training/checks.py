"""Do objective, teacher, data and trainer fit together?

Asked as early as possible, most of it before any weight is loaded. Knows the settings only; what a teacher's tokenizer
says is the teacher's own `preflight`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from opd_lightning.interfaces import Objective, ScoreRequest, Student, Teacher, TokenWeighting
from opd_lightning.objectives import NLL, SampledTokenObjective, known_facts
from opd_lightning.objectives.token_weights import known_divisor
from opd_lightning.rollouts.horizon import Horizon
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.rollouts.prompt_limits import check_context
from opd_lightning.rollouts.reuse import Reuse
from opd_lightning.teachers import BaseModelTeacher, MovingAverageTeacher
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.fsdp2 import FSDP2Strategy


def check_fit(
    *,
    teacher: Teacher | None,
    objective: Objective,
    data: OPDDataModule,
    trainer: Trainer,
    max_tokens_per_micro_batch: int,
    facts_k: int,
) -> None:
    """Refuse settings that cannot train.

    Raises:
        ValueError: One of them; the message names it, says what was expected and what to do.
    """
    check_strategy(trainer, teacher)
    request = objective.request()
    if teacher is None and request is not None:
        raise ValueError(
            f"model.teacher: {type(objective).__name__} needs a teacher, for example"
            " {class_path: HFTeacher, init_args: {path: ...}}."
        )
    if str(trainer.limit_train_batches) not in ("None", "1.0") and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.limit_train_batches: the prompt stream goes on where it stopped, so passes would differ in length"
            " and validations be lost. Set trainer.max_steps and trainer.val_check_interval instead."
        )
    _check_staleness(objective, data)
    _check_radius(data, trainer, facts_k)
    _check_log_probs(objective, data)
    if data.selector.needs_rewards and data.horizon is not None:
        raise ValueError(
            f"data.horizon: {type(data.selector).__name__} learns from rewards, and answers that a horizon may cut have"
            " none. Use Shuffled, or horizon: null."
        )
    assert data.stream is not None
    if data.selector.needs_rewards and not all(map(data.task.can_grade, data.stream.problems)):
        none_or_some = "some problems without" if data.task.is_graded else "no"
        raise ValueError(
            f"data.selector: {type(data.selector).__name__} learns from rewards, but {type(data.task).__name__} has"
            f" {none_or_some} answers to mark. Use Shuffled (Mixture for a MixedTask), or a task that marks all."
        )
    _check_comparison(objective, data)
    data.source.check_teacher(teacher, isinstance(trainer.strategy, FSDP2Strategy))
    if data.source.needs_marks:
        _check_marks(data, f"{type(data.source).__name__} reads the marks of answers", "source")
    objective.check_sampling(data.sampling)
    if data.prompts_per_step % trainer.world_size:
        raise ValueError(
            f"data.prompts_per_step={data.prompts_per_step} cannot be split evenly over {trainer.world_size} processes."
            f" Choose a multiple of {trainer.world_size}."
        )
    longest = data.longest_prompt + data.sampling.max_new_tokens
    if max_tokens_per_micro_batch < longest:
        raise ValueError(
            f"model.max_tokens_per_micro_batch={max_tokens_per_micro_batch} cannot hold one rollout: the longest prompt"
            f" has {data.longest_prompt} tokens and sampling.max_new_tokens is {data.sampling.max_new_tokens}. Raise"
            f" it to at least {longest}."
        )
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > len(data.stream) and trainer.check_val_every_n_epoch is not None:
        raise ValueError(
            f"trainer.val_check_interval={interval}: one pass over the data has only {len(data.stream)} steps. Set"
            " trainer.check_val_every_n_epoch: null, which counts steps across passes."
        )


def _check_staleness(objective: Objective, data: OPDDataModule) -> None:
    """Refuse estimators that many steps on the same rollouts lead astray; say what else is hardly meant.

    Raises:
        ValueError: The estimator's expectation is over the weights now, and the rollouts are many steps older, or by
            others.
    """
    age = data.source.staleness
    if age != 0 and isinstance(objective, SampledTokenObjective) and objective.importance is None:
        stale = (
            f"data.source: {type(data.source).__name__}: some rollouts come from other or older weights, and this"
            " objective does not correct for that. Set objective.importance, for example Truncated."
        )
        if age is None or age > 1:
            raise ValueError(stale)
        warnings.warn(stale, stacklevel=2)
    if isinstance(objective, NLL) and age is not None and isinstance(data.source, OnPolicy | OneStepAhead):
        warnings.warn(
            "model.objective: NLL imitates the student's own answers here, which teaches nothing: its expected gradient"
            " is 0. Set data.source to answers that others wrote: Stored (docs/cold_start.md).",
            stacklevel=2,
        )


def _check_log_probs(objective: Objective, data: OPDDataModule) -> None:
    """Refuse losses that read log-probabilities which nobody knows.

    Raises:
        ValueError: They do.
    """
    if not objective.needs_rollout_log_probs or data.source.knows_log_probs(data.sampling):
        return
    remedy = "Set sampling.top_p to 1 and sampling.top_k to 0"
    if data.source.staleness is None:  # then losses without a correction are refused, too
        remedy = (
            "Take an objective that does without, such as DivergenceObjective, or the student's own answers (OnPolicy)"
        )
    elif isinstance(objective, SampledTokenObjective) and not objective.needs_log_ratios:
        remedy += ", or objective.importance: null"
    raise ValueError(
        f"model.objective: {type(objective).__name__} needs the log-probabilities that rollouts were drawn with, but"
        f" {type(data.source).__name__} with {type(data.engine).__name__} does not know them for this data.sampling."
        f" {remedy}."
    )


def _check_comparison(objective: Objective, data: OPDDataModule) -> None:
    """Refuse runs whose answers an objective cannot compare with one another.

    Raises:
        ValueError: There is one answer per prompt, or the task's marks are compared and not every answer has one.
    """
    advantage = objective.advantage if isinstance(objective, SampledTokenObjective) else None
    compares = f"{type(objective if advantage is None else advantage).__name__} compares"
    if data.rollouts_per_prompt < 2 and (objective.compares_answers or objective.compares_marks):
        raise ValueError(
            f"data.rollouts_per_prompt: {compares} a prompt's answers with one another, and there is one of each. Set"
            " it to 2 or more."
        )
    if objective.compares_marks:
        _check_marks(data, f"{compares} the marks of a prompt's answers", "objective")


def _check_marks(data: OPDDataModule, owner: str, setting: str) -> None:
    """Refuse runs in which an answer may have no mark, for an owner (said with why) who is the value of a setting.

    Raises:
        ValueError: One may.
    """
    if data.horizon is not None:
        raise ValueError(f"data.horizon: {owner}, and answers that a horizon may cut have none. Set horizon: null.")
    assert data.stream is not None
    if not all(map(data.task.can_grade, data.stream.problems)):
        raise ValueError(
            f"data.task: {owner}, but {type(data.task).__name__} does not mark those of all its problems. Use a task"
            f" that does, or another {setting}."
        )


def _check_radius(data: OPDDataModule, trainer: Trainer, facts_k: int) -> None:
    """Refuse a radius that nobody measures, and passes that nothing ever lowers.

    Raises:
        ValueError: `rollout_kl` is not known in this run, or neither a radius nor a search is set.
    """
    if not isinstance(data.source, Reuse):
        return
    if data.source.max_kl is None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if data.source.passes == "adaptive" and not any(hasattr(each, "tells_searches") for each in callbacks):
            raise ValueError(
                "data.source.passes: 'adaptive' would only ever double them, since nothing here says that a round was"
                " too long. Set data.source.max_kl, add an EffOPD callback with schedule: rounds, or give a number."
            )
        return
    if not facts_k:
        raise ValueError(
            "data.source.max_kl: it is compared with rollout_kl, which model.top_k_metrics: 0 leaves out. Set"
            " model.top_k_metrics to 1 or more, or max_kl: null."
        )
    if not data.source.knows_log_probs(data.sampling):
        raise ValueError(
            f"data.source.max_kl: it needs the log-probabilities that rollouts were drawn with, but"
            f" {type(data.engine).__name__} does not know them for this data.sampling. Set sampling.top_p to 1 and"
            " sampling.top_k to 0, or max_kl: null."
        )


def check_strategy(trainer: Trainer, teacher: Teacher | None) -> None:
    """Refuse strategies that a step cannot be made under.

    Raises:
        ValueError: The strategy is neither a single device nor DDP nor our FSDP2, or the teacher does not fit it.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise ValueError(
            "trainer.strategy: Lightning's ModelParallelStrategy leaves to the model how it is cut up, and reads"
            " checkpoints that can run code. Use fsdp2 (opd_lightning.FSDP2Strategy), which is built on it."
        )
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        raise ValueError(
            f"trainer.strategy: OPDModule cannot train under {type(strategy).__name__}; its processes would end with"
            " different students. Use auto (a single device), ddp, or fsdp2, which cuts the student up over all."
        )
    inside = [] if teacher is None else list(_with_those_inside(teacher))
    if not isinstance(strategy, FSDP2Strategy) and any(part.sharded for part in inside):
        raise ValueError(
            "model.teacher.sharded: a teacher is cut up as the student is, by trainer.strategy: fsdp2, and this run has"
            f" {type(strategy).__name__}. Set the strategy, or leave sharded out."
        )
    for part in inside:
        if isinstance(strategy, FSDP2Strategy) and isinstance(part, BaseModelTeacher | MovingAverageTeacher):
            raise ValueError(
                f"model.teacher: {type(part).__name__} runs the student itself, which under fsdp2 all processes must do"
                " equally often. Use HFTeacher with the student's path, or trainer.strategy: ddp."
            )


def _with_those_inside(teacher: Teacher) -> Iterator[Teacher]:
    """A teacher, and those that it is made of."""
    yield teacher
    for value in vars(teacher).values():
        for part in value.values() if isinstance(value, dict) else (value,):
            if isinstance(part, Teacher):
                yield from _with_those_inside(part)


def check_teacher(teacher: Teacher, student: Student, data: OPDDataModule, reads_held_out: bool = False) -> None:
    """Make sure that the teacher speaks the student's tokens and can read the problems; no weights are read.

    Args:
        teacher: Not loaded yet.
        student: Not loaded yet.
        data: After its `setup`.
        reads_held_out: Whether it is asked about answers to held-out problems too.

    Raises:
        ValueError: It does not, or cannot.
    """
    teacher.preflight(student)
    training = [] if data.stream is None else data.stream.problems
    held_out = [problem for problems in data.held_out.values() for problem in problems] if reads_held_out else []
    teacher.check_problems([*training, *held_out])
    check_context("model.teacher: it reads", teacher.context_length, data.longest_prompt, data.sampling)


def check_horizon(horizon: Horizon | None, asked: ScoreRequest | None, facts_k: int) -> None:
    """Refuse a horizon that follows a distance which this run does not know.

    Args:
        horizon: None for whole answers.
        asked: What the teacher is asked for; None without a teacher.
        facts_k: Size of the top-k lists of the facts.

    Raises:
        ValueError: It does.
    """
    known = known_facts(asked, facts_k)
    if horizon is not None and (unknown := [name for name in horizon.reads if name not in known]):
        raise ValueError(
            f"data.horizon: {type(horizon).__name__} follows {', '.join(unknown)}, which this run does not measure. Set"
            " model.top_k_metrics to 1 or more and a model.teacher that can tell it, or take GrowingHorizon."
        )


def check_weighting(weighting: TokenWeighting | None, asked: ScoreRequest | None, facts_k: int) -> None:
    """Refuse a token weighting that reads what this run cannot know.

    Args:
        weighting: None when all tokens weigh the same.
        asked: What the teacher is asked for; None without a teacher.
        facts_k: Size of the top-k lists of the facts.

    Raises:
        ValueError: It does.
    """
    if weighting is not None:
        known_divisor(weighting.normalizer, [])  # refuses a normaliser that does not exist
    known = known_facts(asked, facts_k)
    if weighting is not None and (unknown := [name for name in weighting.reads if name not in known]):
        gives = f"which gives {asked}" if asked is not None else "there is none"
        raise ValueError(
            f"model.token_weighting: {type(weighting).__name__} reads {', '.join(unknown)}, which this run cannot know"
            f" from its teacher ({gives}). Known are: {', '.join(known)}."
        )
