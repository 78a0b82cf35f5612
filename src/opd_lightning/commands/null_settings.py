"""`null` where there must be something: jsonargparse takes it for any setting."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jsonargparse import Namespace

from opd_lightning.commands.parser import class_at
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule


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
        hint = _type_of(parameter, cls)
        if value is None and _refuses_null(parameter, hint):
            expected = _words(parameter.annotation)
            yield f"{path}.{name}: expected {expected}, got null.{_remedy(name, parameter, cls)}"
        else:
            yield from _nulls_within(f"{path}.{name}", _dataclass_in(hint), value)


def _nulls_within(path: str, dataclass: Any, value: Any) -> Iterator[str]:
    """Those within one argument: a class by its path, the fields of a dataclass, or a list of such."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls_within(f"{path}.{index}", dataclass, item)
    elif isinstance(value, Namespace) and "class_path" in value:
        yield from _nulls(path, class_at(value.class_path), value.get("init_args"))
    elif dataclass is not None:
        yield from _nulls(path, dataclass, value)


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a parameter takes, alone or in a list, by its type; None if it takes none."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for each in get_args(hint) if (found := _dataclass_in(each)) is not None), None)


def _refuses_null(parameter: inspect.Parameter, hint: Any) -> bool:
    if parameter.annotation is inspect.Parameter.empty or parameter.default is None:
        return False
    return not _takes_null(hint)


def _takes_null(hint: Any) -> bool:
    """Whether None is of this type; dict[str, Any], say, takes it within and not in its place."""
    if get_origin(hint) in (Union, UnionType, Annotated):
        return any(map(_takes_null, get_args(hint)))
    return hint in (None, NoneType, Any, object) or (get_origin(hint) is Literal and None in get_args(hint))


def _type_of(parameter: inspect.Parameter, cls: Any) -> Any:
    """The type that stands behind an annotation, which is text in modules that postpone them; Any if it is unknown."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    names = getattr(cls if inspect.isfunction(cls) else cls.__init__, "__globals__", {})
    try:
        return eval(parameter.annotation, dict(names))  # as inspect and typing do it: it is the class's own code
    except (NameError, AttributeError, TypeError, SyntaxError):  # a name for type checkers only, for example
        return Any


def _remedy(name: str, parameter: inspect.Parameter, cls: Any) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return ""
    made = (
        {each.name: each.default_factory for each in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    )
    factory = made.get(name, dataclasses.MISSING)
    return f" Leave it out for {(default if factory is dataclasses.MISSING else factory())!r}."


def _words(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
