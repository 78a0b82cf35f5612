"""The configurations that come with the package: `--config @quickstart`, and `opd-lightning configs`."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

import opd_lightning
from opd_lightning.commands.suggestions import nearest


def folder() -> Path:
    """Where they lie: inside an installed package, or at the root of an editable checkout."""
    package = Path(opd_lightning.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def names() -> list[str]:
    """Their names, sorted, those of published methods (`methods/vopd`) last."""
    found = (path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml"))
    return sorted(found, key=lambda name: ("/" in name, name))


def path_of(name: str) -> Path:
    """The file of a shipped configuration.

    Raises:
        ValueError: There is none of that name.
    """
    path = folder() / f"{name}.yaml"
    if name not in names():
        raise ValueError(
            f"config: there is no shipped configuration {name}.{nearest(name, names())} They are: {', '.join(names())}."
        )
    return path


def with_paths(words: Sequence[str]) -> list[str]:
    """The words of a command line with `@name` behind `--config` replaced by the file of that name."""
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--config" and equals and value.startswith("@"):
            found.append(f"--config={path_of(value[1:])}")
        elif word.startswith("@") and found and found[-1] in ("-c", "--config"):
            found.append(str(path_of(word[1:])))
        else:
            found.append(word)
    return found


def show_configs(name: str | None = None) -> None:
    """List the configurations that come with the package, or print one.

    Args:
        name: The one to print; null lists all with their purpose.
    """
    if name is not None:
        print(path_of(name.removeprefix("@")).read_text(encoding="utf-8"), end="")
        return
    columns = shutil.get_terminal_size().columns
    for each in names():
        purpose = re.search(r"^# Purpose: +(.*)$", path_of(each).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert purpose is not None, "tests/test_configs.py holds every file to it"
        print(f"@{each}")
        print(textwrap.fill(purpose[1], columns, initial_indent="    ", subsequent_indent="    "))
    print("\nUse one with `--config @NAME`; a second --config goes on top of the first.")
    print("`opd-lightning configs NAME` prints it.")
