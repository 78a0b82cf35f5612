"""Shell completion: `eval "$(opd-lightning --print_completion)"` in bash.

jsonargparse can write such a script through shtab, but follows every class into the classes it takes: 14 MB for this
command, and a second at the start of each shell. This one knows the commands, their options and the shipped
configurations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from typing_extensions import override

SCRIPT = """\
# bash; zsh reads it after `autoload -U bashcompinit && bashcompinit`
_{function}() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} words=""
  if ((COMP_CWORD == 1)); then
    words="{commands}"
  elif [[ $current == @* ]]; then
    words="{configs}"
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _{function} {program}"""


def completion_script(program: str, options: Mapping[str, Iterable[str]], configs: Iterable[str]) -> str:
    """A bash script that completes commands, their options and `@name`.

    Args:
        program: The command's name.
        options: What may follow each of its commands.
        configs: Names of the shipped configurations.
    """
    cases = "\n".join(f'      {command}) words="{" ".join(sorted(words))}" ;;' for command, words in options.items())
    return SCRIPT.format(
        program=program,
        function=program.replace("-", "_"),
        commands=" ".join(options),
        configs=" ".join(f"@{name}" for name in configs),
        cases=cases,
    )


class PrintAndExit(argparse.Action):
    """An option that prints a text, made only when it is asked for, and ends the program."""

    def __init__(self, option_strings: list[str], dest: str, make_text: Any = None, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)
        self.make_text = make_text

    @override
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        print(self.make_text())
        parser.exit(0)
