"""Does a run fit the checkpoint that it resumes, and what changes when it does not?

A run is described by plain values under the names of its settings. They lie in its checkpoints.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from opd_lightning.interfaces.addresses import is_secret_name, without_secrets

MAY_CHANGE = (  # with a warning: the state in the checkpoint fits, and what is minimised stays
    "data.engine",
    "data.horizon",
    "data.sampling",
    "data.selector.init_args",
    "data.source.init_args",
    "model.gradient_clip_norm",
    "model.objective.chunk_tokens",  # memory only
    "model.teacher",  # a folder that has moved and another port look like another teacher
    "trainer.precision",
)
_OVERRIDE = "model.override_optimizer_on_resume"
_OPTIMIZER_SETTINGS = "model.optimizer.init_args"
_SCHEDULER = "model.lr_scheduler"
_SCHEDULER_SETTINGS = "model.lr_scheduler.init_args"
_ABSENT = object()


class Trained(Protocol):
    """What `OPDModule` says of itself."""

    trainer: Any
    teacher: Any
    objective: Any
    token_weighting: Any
    make_optimizer: OptimizerCallable
    make_lr_scheduler: LRSchedulerCallable | None
    gradient_clip_norm: float | None
    override_optimizer_on_resume: bool


def describe_run(module: Trained, data: Any) -> dict[str, Any]:
    """The settings that a resumed run is compared by, in plain values, by name."""
    settings = {
        "data.engine": data.engine,
        "data.horizon": data.horizon,
        "data.rollouts_per_prompt": data.rollouts_per_prompt,
        "data.sampling": data.sampling,
        "data.selector.init_args": data.selector,
        "data.source.init_args": data.source,
        "model.gradient_clip_norm": module.gradient_clip_norm,
        "model.objective": module.objective,
        "model.teacher": module.teacher,
        "model.token_weighting": module.token_weighting,
        "trainer.precision": module.trainer.precision,
        _OVERRIDE: module.override_optimizer_on_resume,
    }
    return {
        **data.resume_settings,
        **check_optimizer(module.make_optimizer, module.make_lr_scheduler),
        **{name: describe_settings(value) for name, value in settings.items()},
    }


def describe_settings(value: Any) -> Any:
    """What a setting is, in plain values: an object is its class and those of its attributes its constructor names.

    Attributes may carry a leading underscore. Objects inside are described alike, wherever they lie. Secrets (`api_key`
    and the like; in addresses user, password and query), tensors and modules are left out.
    """
    return _describe(value, frozenset())


def _describe(value: Any, outer: frozenset[int]) -> Any:
    if isinstance(value, str):
        return without_secrets(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    inner = outer | {id(value)}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_describe(item, inner) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, Mapping):
        return {str(key): _describe(item, inner) for key, item in value.items() if not is_secret_name(str(key))}
    if isinstance(value, partial):
        return {"class": _name(value.func), **_describe(value.keywords, inner)}
    if inspect.isroutine(value) or isinstance(value, type):
        return _name(value)
    described: dict[str, Any] = {"class": _name(type(value))}
    if isinstance(value, Tensor | nn.Module) or id(value) in outer:
        return described
    arguments = set(inspect.signature(type(value)).parameters)
    for name, item in getattr(value, "__dict__", {}).items():
        is_argument = name.removeprefix("_") in arguments
        holds_arguments = is_dataclass(item) and not name.startswith("_")
        if (is_argument or holds_arguments) and not is_secret_name(name):
            described[name.removeprefix("_")] = _describe(item, inner)
    return described


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def check_optimizer(make_optimizer: OptimizerCallable, make_lr_scheduler: LRSchedulerCallable | None) -> dict[str, Any]:
    """Build optimiser and scheduler for a single number, take one step, and say what they are.

    Returns:
        Their class names and their settings, for `check_resume`.

    Raises:
        ValueError: One of them refuses its settings, the optimiser needs a closure, or the scheduler cannot be stepped
            without a metric.
    """
    parameter = nn.Parameter(torch.zeros(1, 1))
    try:
        optimizer = make_optimizer([parameter])
    except (ValueError, TypeError) as error:
        setting = "model.optimizer.lr" if str(error).startswith("Invalid learning rate") else "model.optimizer"
        raise ValueError(f"{setting}: {error}") from error
    inner = getattr(optimizer, "optimizer", optimizer)  # EffOPDOptimizer wraps one
    closure = inspect.signature(inner.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"model.optimizer: {type(inner).__name__} computes the loss several times per step (its step needs a"
            " closure), but a step here has one gradient. Use an optimiser that needs gradients only, such as"
            " torch.optim.AdamW."
        )
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    try:
        scheduler = make_lr_scheduler(optimizer) if make_lr_scheduler is not None else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.lr_scheduler: {error}") from error
    _try_step(parameter, inner, scheduler)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler: ReduceLROnPlateau waits for a metric, but schedulers are stepped after every optimiser"
            " step. Use another one, such as WarmupDecay."
        )
    return {
        "model.optimizer": type(inner).__name__,
        _OPTIMIZER_SETTINGS: settings,
        _SCHEDULER: None if scheduler is None else type(scheduler).__name__,
        _SCHEDULER_SETTINGS: None if scheduler is None else _settings_of(scheduler),
    }


def _settings_of(scheduler: Any) -> Any:
    """What a scheduler was made with, as far as it keeps that: not its optimiser, nor how far it is."""
    described = describe_settings(scheduler)
    return {name: value for name, value in described.items() if name not in ("class", "optimizer", "last_epoch")}


def _try_step(parameter: nn.Parameter, optimizer: Any, scheduler: Any) -> None:
    """Some mistakes show with the first step only: T_max=0 is divided by."""
    parameter.grad = torch.zeros_like(parameter)
    name = "model.optimizer"
    try:
        optimizer.step()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            name = "model.lr_scheduler"
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # it watches for a wrapper's step
                scheduler.step()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name}: with these settings no step can be made: {error}.") from error


def check_resume(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse settings that the state in a checkpoint does not fit or that change what is minimised; say all others.

    Args:
        saved: What `describe_run` said of the run that wrote the checkpoint.
        current: The same of this run.

    Raises:
        ValueError: They differ, and not only in `MAY_CHANGE`.
    """
    not_compared: tuple[str, ...] = (
        (_OPTIMIZER_SETTINGS, _SCHEDULER, _OVERRIDE) if current.get(_OVERRIDE) else (_OVERRIDE,)
    )
    for name in sorted(saved.keys() - current.keys()):
        warnings.warn(
            f"{name}: the checkpoint was written with {saved[name]}, and this version has no such setting.",
            stacklevel=2,
        )
    for name, old, new in _differences(saved, current):
        if name.startswith(not_compared):
            continue
        if old is _ABSENT:
            warnings.warn(f"{name}: an older checkpoint, which does not say; not compared.", stacklevel=2)
        elif name.startswith((_OPTIMIZER_SETTINGS, _SCHEDULER_SETTINGS)):
            warnings.warn(
                f"{name}: a resumed run keeps the checkpoint's {old}; this run's {new} is ignored. Set"
                f" {_OVERRIDE}: true to use this run's optimiser settings and scheduler.",
                stacklevel=2,
            )
        elif name.startswith(MAY_CHANGE):
            warnings.warn(
                f"{name}: the checkpoint was written with {old}, this run has {new} and goes on with that.",
                stacklevel=2,
            )
        else:
            also = f", set {_OVERRIDE}: true" if name == _SCHEDULER else ""
            raise ValueError(
                f"{name}: the checkpoint was written with {old}, this run has {new}. Resume with the same{also}, or"
                " start a new run from the checkpoint's weights (opd-lightning export, then student.path)."
            )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, saved and current value of each setting that differs; of nested ones only the innermost that do."""
    for name, new in current.items():
        old = saved.get(name, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("class") == new.get("class"):
            inner = _differences(old, new)
            yield from ((f"{name}.{key}", *values) for key, *values in inner)
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            yield name, old["class"], new["class"]
        elif old != new:
            yield name, old, new


def override_optimizer(
    checkpoint: dict[str, Any], make_optimizer: OptimizerCallable, make_lr_scheduler: LRSchedulerCallable | None
) -> None:
    """Put this run's optimiser settings and scheduler into a loaded checkpoint; moments and step counts stay.

    The scheduler is rehearsed up to the checkpoint's step, so the learning rate is the one that this run's settings
    would have reached there, whatever the scheduler is.

    Raises:
        ValueError: The optimiser has several groups of weights, which a rehearsal on one weight does not show.
    """
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1, 1))])
    schedulers = []
    if make_lr_scheduler is not None:
        scheduler = make_lr_scheduler(optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.* before .*optimizer.step")
            for _ in range(checkpoint["global_step"]):
                scheduler.step()
        schedulers.append(scheduler.state_dict())
    checkpoint["lr_schedulers"] = schedulers
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    for state in checkpoint["optimizer_states"]:
        if len(state["param_groups"]) != 1:
            raise ValueError(
                "model.override_optimizer_on_resume: the checkpoint's optimiser has"
                f" {len(state['param_groups'])} groups of weights; expected 1. Resume without it."
            )
        state["param_groups"] = [{**settings, "params": state["param_groups"][0]["params"]}]
