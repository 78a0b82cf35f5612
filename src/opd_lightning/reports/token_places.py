"""Which tokens of an answer are its last line, and which say the reference answer."""

from __future__ import annotations

import re
from collections.abc import Sequence


def last_line(texts: Sequence[str]) -> list[bool]:
    """Which tokens stand behind the last line break that has something behind it."""
    breaks = [place for place, text in enumerate(texts) if "\n" in text]
    filled = [place for place, text in enumerate(texts) if text.strip()]
    before = [place for place in breaks if filled and place < filled[-1]]
    return [place > before[-1] for place in range(len(texts))] if before else []


def last_mention(texts: Sequence[str], reference: str | None) -> list[bool]:
    """Which tokens have a part in the last place where the reference is said, as a whole word or number."""
    said = list(_as_a_whole(reference).finditer("".join(texts))) if reference else []
    if not said:
        return []
    (start, stop), place, hits = said[-1].span(), 0, []
    for text in texts:
        hits.append(place < stop and place + len(text) > start)
        place += len(text)
    return hits


def _as_a_whole(reference: str) -> re.Pattern[str]:
    """Not inside a longer word or number: 6 is not in 26, 6.5, 1,6 or -6, but is in 5-6 and in 6."""
    before = r"(?<!\w)" if re.match(r"\w", reference, re.ASCII) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", reference, re.ASCII) else ""
    if reference[0].isdigit():
        before += r"(?<!\d[.,])(?<!(?<![\w)])-)"
    if reference[-1].isdigit():
        after += r"(?![.,]\d)"
    # ASCII: languages without spaces write words right beside a number
    return re.compile(before + re.escape(reference) + after, re.ASCII)
