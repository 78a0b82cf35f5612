"""The token view: what the teacher told the student about every token, to look at in a browser.

Findings in words and tables come from here and need no script; the answers themselves are drawn by `token_view.js`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from opd_lightning.reports.contents import Statement, Table
from opd_lightning.reports.files import templates
from opd_lightning.reports.plots import draw
from opd_lightning.reports.token_findings import carries_answer, fades, measure_of, read_answers, where
from opd_lightning.reports.token_payload import Payload, shown_steps
from opd_lightning.reports.token_records import FOLDER, find_records, has_records

_HERE = Path(__file__).parent
Fragment = tuple[str, str]  # heading, and HTML that is safe as it is


@dataclass(frozen=True)
class Finding:
    """A question, and what the records say about it.

    Attributes:
        question: What is asked.
        statement: The answer and its grounds.
        tables: Its numbers.
        drawing: Curves as SVG; None without.
    """

    question: str
    statement: Statement
    tables: Sequence[Table]
    drawing: Markup | None = None


@dataclass
class RunView:
    """What is known of one run.

    Attributes:
        label: Its name.
        findings: In the order in which they are shown.
    """

    label: str
    findings: list[Finding] = field(default_factory=list)


def token_view(records: Sequence[Path], *, labels: Sequence[str] = (), max_tokens: int = 20_000) -> str:
    """One HTML fragment that needs nothing beside itself: its style is scoped, its script inline.

    Other content may stand on the same page; colours follow the reader's light or dark theme.

    Args:
        records: One or two runs: their folders, or the folders of their records.
        labels: Names of the runs; by default those of the folders.
        max_tokens: Most tokens that can be looked at, over all runs and steps; findings are of all that was recorded.

    Raises:
        ValueError: A folder holds no records, or there are neither one nor two.
    """
    if not 1 <= len(records) <= 2:
        raise ValueError(f"records: expected one or two runs, got {len(records)}.")
    folders = [find_records(Path(folder)) for folder in records]
    names = list(labels) or [name_of(folder) for folder in folders]
    payload = Payload(names if len(folders) > 1 else [""])
    notes = []
    for run, folder in enumerate(folders):
        steps, most, note = shown_steps(folder, max_tokens // len(folders))
        payload.add(folder, run, steps, most)
        notes += [note] if note else []
    return (
        templates()
        .get_template("token_view.html.jinja")
        .render(
            runs=[
                RunView(name, find(folder, f"tokens-{run}"))
                for run, (name, folder) in enumerate(zip(names, folders, strict=True))
            ],
            notes=[*notes, *payload.notes()],
            payload=Markup(as_script_data(payload.contents())),
            style=Markup((_HERE / "token_view.css").read_text(encoding="utf-8")),
            script=Markup((_HERE / "token_view.js").read_text(encoding="utf-8")),
        )
    )


def token_fragment(runs: Sequence[Path], *, labels: Sequence[str] = ()) -> Fragment | None:
    """Heading and fragment for a page about runs; None where nothing was recorded of any. The first two are shown.

    Args:
        runs: Their folders.
        labels: Their names; by default those of the folders.

    Raises:
        ValueError: Records cannot be read.
    """
    names = list(labels) or [name_of(Path(folder)) for folder in runs]
    recorded = [(folder, name) for folder, name in zip(runs, names, strict=True) if has_records(Path(folder))][:2]
    if not recorded:
        return None
    return "Tokens", token_view([folder for folder, _ in recorded], labels=[name for _, name in recorded])


def render_token_page(records: Sequence[Path], *, labels: Sequence[str] = (), max_tokens: int = 20_000) -> str:
    """A whole page that shows `token_view` alone; needs nothing beside itself.

    Args:
        records: One or two runs: their folders, or the folders of their records; two stand side by side.
        labels: Names of the runs; by default those of the folders.
        max_tokens: Most tokens that the page holds; it says what it leaves out.

    Raises:
        ValueError: A folder holds no records, or there are neither one nor two.
    """
    fragment = token_view(records, labels=labels, max_tokens=max_tokens)
    title = "What the teacher said about every token"
    return templates().get_template("token_page.html.jinja").render(title=title, fragment=Markup(fragment))


def find(folder: Path, prefix: str) -> list[Finding]:
    """The answers to the three questions about a run.

    Args:
        folder: Of its records.
        prefix: Begins the ids in its drawing, which have to differ from others on the page.
    """
    measure = measure_of(folder)
    answers = read_answers(folder, measure)
    (faded, fade_tables, panels) = fades(answers)
    drawing = draw(panels, prefix)
    return [
        Finding("Where do they disagree?", *where(answers, measure)),
        Finding("Does it carry the answer?", *carries_answer(answers)),
        Finding("Does it fade with training?", faded, fade_tables, None if drawing is None else Markup(drawing)),
    ]


def as_script_data(contents: Any) -> str:
    r"""JSON that cannot end the script it stands in: an answer may hold ``</script>``, which ``\u003c`` keeps apart."""
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def name_of(folder: Path) -> str:
    """The run's folder, also where that of the records is given and has the usual name."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == FOLDER else folder.name
