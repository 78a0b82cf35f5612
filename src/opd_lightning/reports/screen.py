"""A report on the terminal, through rich."""

from __future__ import annotations

from rich import box, table
from rich.console import Console
from rich.text import Text

from opd_lightning.reports.contents import Report, Table
from opd_lightning.reports.printable import printable


def show(report: Report, console: Console) -> None:
    """Print it; what models wrote cannot command the terminal."""
    console.print(Text(f"\n{printable(report.title)}", style="bold"))
    console.print(Text(printable(report.subtitle), style="dim"))
    for each in report.tables:
        console.print(_grid(each))
        if each.note:
            console.print(Text(printable(each.note), style="dim"))
    for text in report.texts:
        console.print(Text(f"\n{printable(text.title)}", style="bold"))
        console.print(Text(printable(text.text)))
    console.print()
    for note in report.notes:
        console.print(Text(printable(note)))
    for statement in report.statements:
        console.print(Text(f"\n{printable(statement.words)}", style="bold"))
        for name, words in statement.grounds:
            console.print(Text(f"  {name}: {printable(words)}", style="" if name == "because" else "dim"))


def _grid(contents: Table) -> table.Table:
    grid = table.Table(title=Text(contents.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(contents.columns):
        grid.add_column(Text(column), justify="right" if place else "left", overflow="fold")
    for row in contents.rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    return grid
