"""The code that the pages show: fenced blocks and commands in running text, as a Markdown parser finds them.

A block that no test can run says why, in a comment of the page in front of it: `<!-- not run: needs two GPUs -->`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TOOLS = ("opd-lightning", "python", "pytest", "nox", "bash", "pip")  # whose commands in running text are looked at
_MARKDOWN = MarkdownIt("commonmark").enable("table")
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)
_VARIABLE = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it is written in, and why it is not run (empty when it is)."""

    page: str
    line: int
    language: str
    code: str
    not_run: str = ""
    files: dict[str, str] = field(default_factory=dict, compare=False)  # modules that the page shows, by file name

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a page, split into words, variables in front left out."""

    where: str
    words: list[str]
    files: dict[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words[:2])}"


def blocks() -> list[Block]:
    """Every fenced block of every page."""
    return [block for page in PAGES for block in _blocks_of(page)]


def _blocks_of(page: Path) -> list[Block]:
    found: list[tuple[int, str, str, str]] = []
    files: dict[str, str] = {}
    reason = heading = ""
    tokens = _MARKDOWN.parse(page.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "html_block":
            reason = match[1] if (match := _NOT_RUN.search(token.content)) else ""
            continue
        if token.type == "inline" and before is not None and before.type == "heading_open":
            heading = token.content
        if token.type == "fence":
            assert token.map is not None
            found.append((token.map[0] + 1, token.info.strip(), token.content, reason))
            if token.info == "python" and (name := re.search(r"`(\w+\.py)`", heading)):
                files.setdefault(name[1], token.content)
        reason = ""
    name = str(page.relative_to(ROOT))
    return [Block(name, line, language, code, reason, files) for line, language, code, reason in found]


def commands() -> list[Command]:
    """Every command of bash blocks, and of code in running text."""
    found = []
    for block in blocks():
        if block.language == "bash" and not block.not_run:
            for line in block.code.replace("\\\n", " ").splitlines():
                found += [Command(str(block), words, block.files) for words in split(line)]
    for page in PAGES:
        for line, code in _inline(page):
            if code.split()[0] in TOOLS and len(code.split()) > 1:
                code = re.sub(r"\[[A-Z_ .]+\]|\.\.\.$", "", code)  # what may follow
                found += [Command(f"{page.relative_to(ROOT)}:{line}", words) for words in split(code)]
    return found


def _inline(page: Path) -> Iterator[tuple[int, str]]:
    for token in _MARKDOWN.parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline" and child.content.strip():
                assert token.map is not None
                yield token.map[0] + 1, child.content


def split(line: str) -> Iterator[list[str]]:
    """The commands of one line of shell, without comments and without variables set in front."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, "&&"]:
        if word in ("&&", "|", ";"):
            if words:
                yield words
            words = []
        elif words or not _VARIABLE.match(word):
            words.append(word)
