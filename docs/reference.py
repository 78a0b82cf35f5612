"""The reference pages, made of the parser and the docstrings: a page per method and per command, and the Python names.

docs/site.py puts them on the site; `pages()` needs no MkDocs, so that tests can read them.
"""

from __future__ import annotations

import inspect
import os
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import opd_lightning
from opd_lightning.commands.cli import COMMANDS, PLAIN_COMMANDS, OPDTrainer, main
from opd_lightning.commands.parser import SEAMS
from opd_lightning.commands.short_names import import_rooms

ROOT = Path(__file__).parents[1]
METHODS = (  # kinds of methods: title, key of SEAMS, and where a configuration names one
    ("Objectives", "objective", "model.objective"),
    ("Supports", "support", "model.objective.support"),
    ("Divergences", "divergence", "model.objective.divergence"),
    ("Estimators", "estimator", "model.objective.estimator"),
    ("Importance ratios", "importance", "model.objective.importance"),
    ("Advantages", "advantage", "model.objective.advantage"),
    ("Token weightings", "token_weighting", "model.token_weighting"),
    ("Students", "student", "model.student"),
    ("Teachers", "teacher", "model.teacher"),
    ("Rollout sources", "source", "data.source"),
    ("Horizons", "horizon", "data.horizon"),
    ("Engines", "engine", "data.engine"),
    ("Tasks", "task", "data.task"),
    ("Selectors", "selector", "data.selector"),
    ("Scores", "score", "score"),
    ("Schedules", "lr_scheduler", "model.lr_scheduler"),
    ("Callbacks", "callbacks", "trainer.callbacks"),
)
ROOMS = {  # the other public names, in the order in which a reader needs them: the start of their module's name
    "Training": "training",
    "EffOPD outside Lightning": "extrapolation",
    "Settings": ("backends", "tasks"),
    "Seams": "interfaces",
    "Factors of objectives": "objectives",
    "Rollouts": ("rollouts", "sandbox"),
    "Published methods": "methods",
    "Pages": "reports",
}


def shipped(seam: type) -> list[type]:
    """The concrete classes of the package behind a seam, by name."""
    found: set[type] = set()
    waiting = seam.__subclasses__()
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        ours = cls.__module__.startswith("opd_lightning.") and not cls.__name__.startswith("_")
        if ours and not inspect.isabstract(cls):
            found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def methods() -> dict[str, list[type]]:
    """The public classes that a configuration may name, by kind."""
    import_rooms()
    public = set(opd_lightning.__all__)
    return {title: [cls for cls in shipped(SEAMS[key]) if cls.__name__ in public] for title, key, _ in METHODS}


def pages() -> dict[str, str]:
    """Text of every page by its path."""
    made = {"reference/commands.md": commands_index(), "reference/configurations.md": configurations()}
    made |= {f"reference/commands/{name}.md": command(name) for name in COMMANDS}
    return made | pages_of_names()


def pages_of_names() -> dict[str, str]:
    """Text of those pages that together show every public name."""
    made = {"reference/methods.md": methods_index(), "reference/python.md": python_names()}
    for title, _, setting in METHODS:
        made |= {method_page(cls): method(cls, title, setting) for cls in methods()[title]}
    return made


def nav() -> list[dict[str, Any]]:
    """The entries of the reference in the site's navigation."""
    kinds = [
        {title: [{cls.__name__: method_page(cls)} for cls in classes]}
        for title, classes in methods().items()
        if classes
    ]
    return [
        {"Commands": ["reference/commands.md", *({name: f"reference/commands/{name}.md"} for name in COMMANDS)]},
        {"Configurations": "reference/configurations.md"},
        {"Methods": ["reference/methods.md", *kinds]},
        {"Python": "reference/python.md"},
    ]


def method_page(cls: type) -> str:
    """Path of a method's page."""
    return f"reference/methods/{cls.__name__}.md"


def methods_index() -> str:
    """Every method in a table of its kind."""
    parts = [
        "# Methods\n\nWhat a configuration may name, by kind; [your own](../your_own_method.md) goes the same way.\n"
    ]
    for title, _, setting in METHODS:
        rows = [f"| [{cls.__name__}](methods/{cls.__name__}.md) | {_first_sentence(cls)} |" for cls in methods()[title]]
        parts.append(f"## {title}\n\nSetting: `{setting}`\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def method(cls: type, kind: str, setting: str) -> str:
    """One method: where it is named, and its docstring."""
    where = f"`{setting}: [{cls.__name__}]`" if setting == "trainer.callbacks" else f"`{setting}: {cls.__name__}`"
    return f"# {cls.__name__}\n\n*{kind}*, setting {where}.\n\n{_directive(cls)}"


def commands_index() -> str:
    """The commands, one line each."""
    rows = [f"| [{name}](commands/{name}.md) | {_purpose(name)} |" for name in COMMANDS]
    return (
        "# Commands\n\n`opd-lightning COMMAND --help` says what follows; classes explain themselves too:"
        " `opd-lightning fit --model.objective.help DivergenceObjective`.\n\n| | |\n|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def command(name: str) -> str:
    """What a command says of itself."""
    before = dict(os.environ)
    os.environ |= {"NO_COLOR": "1", "COLUMNS": "110"}
    try:
        with redirect_stdout(StringIO()) as shown, suppress(SystemExit):
            main([name, "--help"])
    finally:
        os.environ.clear()
        os.environ |= before
    return f"# {name}\n\n{_purpose(name)}\n\n```text\n{shown.getvalue().strip()}\n```\n"


def configurations() -> str:
    """The shipped configurations as they are."""
    parts = [
        "# Shipped configurations\n\nUse one with `--config @NAME`; a second `--config` goes on top of the first.\n"
    ]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        parts.append(f"## @{path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(parts)


def python_names() -> str:
    """The public names that no configuration names: directives that mkdocstrings replaces by docstrings."""
    own_page = {cls.__name__ for classes in methods().values() for cls in classes}
    names = sorted({*opd_lightning.__all__} - own_page)
    waiting = {name: getattr(opd_lightning, name).__module__.removeprefix("opd_lightning.") for name in names}
    parts = [
        "# Python\n\nEvery public name can be imported from the top: `from opd_lightning import OPDModule, EffOPD`."
        " The classes that a configuration names have [pages of their own](methods.md). What is on neither page may"
        " change without notice.\n"
    ]
    for title, rooms in ROOMS.items():
        names = [name for name, home in waiting.items() if home.startswith(rooms)]
        parts.append(f"## {title}\n")
        for name in names:
            parts.append(_directive(getattr(opd_lightning, name), heading=True))
            del waiting[name]
    assert not waiting, f"ROOMS of docs/reference.py knows no place for {sorted(waiting)}"
    parts.append("## Geometry of updates\n\n::: opd_lightning.geometry\n    options: {show_root_heading: false}\n")
    return "\n".join(parts)


def _directive(value: Any, heading: bool = False) -> str:
    return f"::: {value.__module__}.{value.__name__}\n    options: {{show_root_heading: {str(heading).lower()}}}\n"


def _first_sentence(value: Any) -> str:
    text = re.sub(r"\s+", " ", inspect.getdoc(value) or "")
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":").replace("|", "\\|")


def _purpose(name: str) -> str:
    verb = PLAIN_COMMANDS[name] if name in PLAIN_COMMANDS else getattr(OPDTrainer, name)
    return _first_sentence(verb)
