"""`opd-lightning report RUN [RUN2 ...]`: what runs recorded, as one page, tables and JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import rich

from opd_lightning.reports.files import write_text
from opd_lightning.reports.plots import COLOURS, can_draw
from opd_lightning.reports.screen import show
from opd_lightning.reports.token_records import has_records
from opd_lightning.reports.token_view import Fragment, name_of, render_token_page, token_fragment
from opd_lightning.reports.training_runs.folder import RECORDER, Run, find_folder, find_tokens, read_runs
from opd_lightning.reports.training_runs.page import write_report
from opd_lightning.training.output_paths import check_folder

_TAKE_A_VALUE = ("--runs", "--output", "--config")
_BOOLEANS = ("true", "false")


def report(runs: Sequence[str] = (), output: str | None = None, tokens: bool = False) -> None:
    """Show what a run recorded, or several beside each other: RUN [RUN2 ...] are their folders.

    Args:
        runs: Folders of runs, with metrics.csv in them or somewhere below. A run that was resumed is read together
            with the runs it went on from.
        output: Folder for `report.html` and `report.json`; null: `report` in the folder of the run, or `comparison` in
            that of the first of several.
        tokens: Write `tokens.html` alone, the view of what TokenRecorder recorded of one or two runs; it needs no
            metrics.csv. Without this the page of runs ends with the same view, where there are records.
    """
    if not runs:
        raise ValueError("runs: expected at least one folder of a run: opd-lightning report RUN [RUN2 ...].")
    if len(runs) > len(COLOURS):
        raise ValueError(
            f"runs: expected at most {len(COLOURS)}, one for each colour, got {len(runs)}. Leave some out."
        )
    if tokens:
        _write_tokens(runs, output)
        return
    found = read_runs(runs)
    usual = found[0].folder / ("report" if len(found) == 1 else "comparison")
    folder = usual if output is None else Path(output).expanduser()
    check_folder("output", folder)
    shown = write_report(folder, found, fragments=_fragments(found))
    show(shown.for_terminal(), rich.get_console())
    if not can_draw():
        print("Without curves: they are drawn where matplotlib is installed (the extra 'reports').", file=sys.stderr)
    print(f"\nWrote {folder / 'report.html'} and {folder / 'report.json'}")


def _fragments(runs: Sequence[Run]) -> list[Fragment]:
    """The token view of the first two runs with records; parts of one run share theirs."""
    recorded: dict[Path, str] = {}
    for run in runs:
        tokens = find_tokens(run.folder)
        if tokens is not None:
            recorded.setdefault(tokens.resolve(), run.label)
        elif RECORDER in run.settings:
            named = run.settings.get(f"{RECORDER}.dirpath") or run.folder
            print(f"Without tokens of {run.label}: TokenRecorder left no records in {str(named)!r}.", file=sys.stderr)
    fragment = token_fragment(list(recorded), labels=list(recorded.values()))
    return [] if fragment is None else [fragment]


def _write_tokens(runs: Sequence[str], output: str | None) -> None:
    places = [Path(run) if has_records(Path(run)) else find_folder(run) for run in runs]
    folder = places[0] / "report" if output is None else Path(output).expanduser()
    check_folder("output", folder)
    page = render_token_page([find_tokens(place) or place for place in places], labels=list(map(name_of, places)))
    write_text(folder / "tokens.html", page)
    print(f"Wrote {folder / 'tokens.html'}")


def with_runs_named(words: Sequence[str]) -> list[str]:
    """The words of the command line with the folders among them as the value of `--runs`.

    `--tokens` alone is true; true or false behind it is its value, as it is after `=`.

    Raises:
        ValueError: Folders are named in both ways.
    """
    folders: list[str] = []
    others: list[str] = []
    for before, word, after in zip(("", *words), words, (*words[1:], ""), strict=False):
        if before == "--tokens" and word in _BOOLEANS:
            continue
        if word.startswith("-") or before in _TAKE_A_VALUE:
            value = after if after in _BOOLEANS else "true"
            others.append(f"--tokens={value}" if word == "--tokens" else word)
        else:
            folders.append(word)
    if not folders:
        return others
    if any(word.partition("=")[0] == "--runs" for word in others):
        raise ValueError(f"runs: expected folders as words or after --runs, got both (as a word: {folders[0]!r}).")
    as_yaml = ", ".join("'" + folder.replace("'", "''") + "'" for folder in folders)
    return ["--runs", f"[{as_yaml}]", *others]
