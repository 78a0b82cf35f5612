"""A report on the terminal."""

import io

from example_report import REPORT
from rich.console import Console

from opd_lightning.reports.contents import Report, Statement, Text
from opd_lightning.reports.screen import show


def shown(report, width=60):
    file = io.StringIO()
    show(report, Console(file=file, width=width, force_terminal=False))
    return file.getvalue()


def test_everything_is_there_and_the_verdict_is_last():
    text = shown(REPORT)
    for words in ("A <title> & more", "overlap", "0.75", "k = 16", "<script>alert(1)</script>", "Left out: nothing."):
        assert words in text
    assert text.index("Left out") < text.index("Distil") < text.index("arXiv 2604.13016")


def test_words_of_models_command_neither_terminal_nor_markup():
    report = Report("t", "s", [Statement("[red]w[/red]", ())], [], texts=[Text("\x1b[2Jname", "[bold]\x1b]0;x\x07")])
    text = shown(report)
    assert "\x1b" not in text and "\\x1b[2Jname" in text and "[bold]" in text and "[red]w[/red]" in text
