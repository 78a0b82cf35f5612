"""The parser of the command line: a mistake is answered by one line that says what was expected.

jsonargparse prints its whole usage, and the complaints of every branch of a union with the values spelt out. `explain`
keeps the complaint that matters and adds the names that would have been right.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, NoReturn

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from opd_lightning.commands.shipped_configs import with_paths
from opd_lightning.commands.suggestions import nearest
from opd_lightning.interfaces import (
    Advantage,
    Objective,
    PromptSelector,
    RolloutEngine,
    RolloutSource,
    Score,
    Student,
    Task,
    Teacher,
    TokenWeighting,
)
from opd_lightning.interfaces.addresses import without_secrets
from opd_lightning.objectives import Estimator, Importance, Support
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.rollouts.horizon import Horizon

PROGRAM = "opd-lightning"
SEAMS: dict[str, type] = {
    "advantage": Advantage,
    "estimator": Estimator,
    "importance": Importance,
    "source": RolloutSource,
    "support": Support,
    "token_weighting": TokenWeighting,
    "callbacks": Callback,
    "divergence": Divergence,
    "engine": RolloutEngine,
    "horizon": Horizon,
    "inner": PromptSelector,
    "lr_scheduler": LRScheduler,
    "objective": Objective,
    "optimizer": Optimizer,
    "score": Score,
    "selector": PromptSelector,
    "student": Student,
    "task": Task,
    "teacher": Teacher,
}

_SAYS_NOTHING = re.compile(
    r"Does not validate against any|Subtypes: |Errors:$|Expected a <class 'NoneType'>|Given value type: "
    r"|Given value: (\{|\[|Namespace|NestedArg)|Expected a path but .* not accessible or invalid$"
    r"|Not a valid subclass of|Subclass types expect one of|a (class path|dict) "
)
_IN_OTHER_WORDS = (
    (r"Call to compute_fn of link .*? failed: ", ""),
    (r"Type typing\.Callable.*? expects a function or a callable class: ", ""),
    (  # of optimisers and schedulers, which are functions to jsonargparse
        r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'.*",
        r"Problem with given class_path '\2': Option '\1' is not accepted",
    ),
    (r"\.?;? Got value: Namespace\(.*", ""),
    (r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1"),
    (r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", r"expected \1"),
    (r"\. Got value: ", ", got "),
    (r"Given value: ", "got "),
    (r"\bfit\.(?=(?:model|data|trainer)\b)|\b(?:validate|test|predict)\.(?=(?:model|data|trainer)\.)", ""),
    (r'Parser key "([\w.]+)":', r"\1:"),
)
_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: (?=.*--)(.*)")
_UNKNOWN_SETTING = re.compile(r"(?:Subcommand|Group) '\w+' does not accept option '([\w.]+)'")
_UNKNOWN_ARGUMENT = re.compile(r"Problem with given class_path '([\w.]+)': Option '([\w.]+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"(\w+): (?:(?!\w+: ).)*?Expected a dot import path string: (\w+)(?:; got \2)?")
_UNKNOWN_IN_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'(?:, got \1\.\2$)?")
_FILLED_IN = ("params", "optimizer")  # arguments that the training gives, not the user
_MANY = 20


class OneLineParser(LightningArgumentParser):
    """Knows the shipped configurations by name, and ends with one line on standard error and exit status 2."""

    @override
    def parse_args(self, args: Sequence[str] | None = None, *options: Any, **named: Any) -> Any:  # type: ignore[override]
        return super().parse_args(with_paths(sys.argv[1:] if args is None else args), *options, **named)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a branch of a union is tried
            super().error(message, ex)
        text = explain(message, options_of(self))
        if text.startswith(("Problems parsing config", "Unexpected config")):  # without saying in which file
            files = [after for word, after in pairwise(self.args) if word in ("-c", "--config")]
            text = f"{', '.join(files)}: expected settings such as `model:`, `data:` and `trainer:` in YAML. {text}"
        print(f"{PROGRAM}: error: {without_secrets(text)}", file=sys.stderr)
        self.exit(2)


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Shorten a message of jsonargparse to one line; what it does not recognise is kept.

    Args:
        message: The message, on one line or many.
        options: Every option of the command line (``--data.seed``), for suggestions.
    """
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line and not _SAYS_NOTHING.match(line)))
    text = " ".join(line if line.endswith((":", ".", ",")) or line == lines[-1] else f"{line};" for line in lines)
    for pattern, replacement in _IN_OTHER_WORDS:
        text = re.sub(pattern, replacement, text)
    text = _UNKNOWN_OPTION.sub(lambda match: _about_options(match[1], options), text)
    text = _UNKNOWN_SETTING.sub(lambda match: _about_setting(match[1], options), text)
    text = _UNKNOWN_ARGUMENT.sub(lambda match: _about_argument(*match.groups()), text)
    text = _UNKNOWN_CLASS.sub(lambda match: _about_class(match[0], *match.groups()), text)
    text = _UNKNOWN_IN_MODULE.sub(lambda match: _about_module(*match.groups()), text)
    text = re.sub(r"Problem with given class_path '[\w.]*?(\w+)':", r"\1:", text)
    text = text.replace("Expected a dot import path string:", "or a class path:").replace(".;", ".")
    if text.endswith(":"):  # nothing of what was said about it is worth repeating
        got = re.search(r"Given value: (.*)", message)
        text += " expected a class, as in {class_path: ..., init_args: {...}}" + (f"; got {got[1]}" if got else "")
    return text


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser and of its subcommands."""
    options: set[str] = set()
    for action in parser._actions:
        options.update(name for name in action.option_strings if name.startswith("--"))
        for subparser in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
            options |= options_of(subparser)
    return options


def class_at(class_path: str) -> Any:
    """The class that a full path names."""
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def short_names(seam: type) -> list[str]:
    """Names of the subclasses that can be built, as far as they have been imported (the class's own if it has none)."""
    found: set[str] = set()
    waiting: list[type] = seam.__subclasses__() or [seam]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.add(cls.__name__)
    return sorted(found)


def _about_options(words: str, options: Iterable[str]) -> str:
    unknown = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
    settings = [option for option in options if not option.endswith(".help")]  # --model.student.help sets nothing
    return " ".join(f"there is no option {name}.{nearest(name, settings)}" for name in unknown)


def _about_setting(name: str, options: Iterable[str]) -> str:
    return f"there is no setting {name}.{nearest(name, [option.removeprefix('--') for option in options])}"


def _about_argument(class_path: str, name: str) -> str:
    class_name = class_path.rpartition(".")[2]
    arguments = [name for name in inspect.signature(class_at(class_path)).parameters if name not in _FILLED_IN]
    return f"{class_name} has no argument {name}.{nearest(name, arguments)} It takes: {', '.join(arguments)}."


def _about_class(message: str, setting: str, name: str) -> str:
    if setting not in SEAMS:
        return message
    names = short_names(SEAMS[setting])
    listed = f"one of {', '.join(names)}, or " if len(names) <= _MANY else ""
    return (
        f"{setting}: there is no class {name} here; expected {listed}a class path such as my_package.MyClass."
        + nearest(name, names)
    )


def _about_module(module: str, name: str) -> str:
    return f"there is no {module}.{name}.{nearest(name, dir(import_module(module)))}"
