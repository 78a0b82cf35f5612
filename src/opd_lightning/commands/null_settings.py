"""`null` where there must be something: jsonargparse takes it for any setting."""

from __future__ import annotations

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
        settings: Of one command, with `model` and `data`.

    Raises:
        ValueError: There is one; names the setting.
    """
    for name, cls in (("model", OPDModule), ("data", OPDDataModule)):
        for message in _nulls(name, cls, settings.get(name)):
            raise ValueError(message)


def _nulls(path: str, cls: Any, arguments: Any) -> Iterator[str]:
    parameters = inspect.signature(cls).parameters
    for name, value in vars(arguments).items() if isinstance(arguments, Namespace) else ():
        parameter = parameters.get(name)
        if name in ("optimizer", "lr_scheduler"):  # tried by one step (training.resuming)
            continue
        if value is None and parameter is not None and _refuses_null(parameter):
            default = parameter.default
            remedy = "" if default is inspect.Parameter.empty else f" Leave it out for {default!r}."
            yield f"{path}.{name}: expected {_words(parameter.annotation)}, got null.{remedy}"
        elif isinstance(value, Namespace) and "class_path" in value:
            yield from _nulls(f"{path}.{name}", class_at(value.class_path), value.get("init_args"))


def _refuses_null(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty or parameter.default is None:
        return False
    return not any(word in _words(annotation) for word in _MAY_BE_NULL)


def _words(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
