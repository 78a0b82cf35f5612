"""`null` where there must be something: jsonargparse takes it for any setting."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from opd_lightning.commands.parser import class_at
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

_MAY_BE_NULL = ("None", "Optional", "Any")


def check_nulls(settings: Mapping[str, Any] | Namespace) -> None:
    """Refuse null where the constructor that takes the setting does not.

    Args:
        settings: Of one command, with `model`, `data` and `trainer`.

    Raises:
        ValueError: There is one; names the setting.
    """
    of_trainer = settings.get("trainer")
    callbacks = of_trainer.get("callbacks") if isinstance(of_trainer, Namespace) else None
    for message in (
        *_nulls("model", OPDModule, settings.get("model")),
        *_nulls("data", OPDDataModule, settings.get("data")),
        *_nulls_within("trainer.callbacks", None, callbacks),
    ):
        raise ValueError(message)


def _nulls(path: str, cls: Any, arguments: Any) -> Iterator[str]:
    """Those among the arguments of a constructor, and within them."""
    parameters = inspect.signature(cls).parameters
    for name, value in vars(arguments).items() if isinstance(arguments, Namespace) else ():
        parameter = parameters.get(name)
        if parameter is None or name in ("optimizer", "lr_scheduler"):  # tried by one step (training.resuming)
            continue
        if value is None and _refuses_null(parameter):
            default = parameter.default
            remedy = "" if default is inspect.Parameter.empty else f" Leave it out for {default!r}."
            yield f"{path}.{name}: expected {_words(parameter.annotation)}, got null.{remedy}"
        else:
            yield from _nulls_within(f"{path}.{name}", _dataclass_in(parameter, cls), value)


def _nulls_within(path: str, dataclass: Any, value: Any) -> Iterator[str]:
    """Those within one argument: a class by its path, the fields of a dataclass, or a list of such."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls_within(f"{path}.{index}", dataclass, item)
    elif isinstance(value, Namespace) and "class_path" in value:
        yield from _nulls(path, class_at(value.class_path), value.get("init_args"))
    elif dataclass is not None:
        yield from _nulls(path, dataclass, value)


def _dataclass_in(parameter: inspect.Parameter, cls: Any) -> Any:
    """The dataclass that a parameter takes, by its annotation; None if it takes none."""
    names = getattr(cls.__init__, "__globals__", {})
    known = (names.get(word.strip()) for word in _words(parameter.annotation).split("|"))
    return next((each for each in known if dataclasses.is_dataclass(each)), None)


def _refuses_null(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty or parameter.default is None:
        return False
    return not any(word in _words(annotation) for word in _MAY_BE_NULL)


def _words(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
