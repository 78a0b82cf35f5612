"""Questions that occur more than once: counted, reported, and left out when asked for."""

from __future__ import annotations

import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opd_lightning.interfaces import Problem
from opd_lightning.tasks.answers import same_answer


@dataclass(frozen=True)
class Repeats:
    """Positions of problems whose question occurred before (up to spacing).

    Attributes:
        duplicates: Pairs (later, first) with the same question and the same answer.
        contradictions: Groups of problems with the same question whose answers are not all the same. Answers that only
            algebra could tell equal count as different.
    """

    duplicates: tuple[tuple[int, int], ...]
    contradictions: tuple[tuple[int, ...], ...]


def find_repeats(problems: Sequence[Problem]) -> Repeats:
    """Group problems by question, and split the groups by whether the answers agree."""
    groups: dict[str, list[int]] = defaultdict(list)
    for position, problem in enumerate(problems):
        words = " ".join(message["content"] for message in problem.messages).split()
        groups[unicodedata.normalize("NFC", " ".join(words))].append(position)
    duplicates: list[tuple[int, int]] = []
    contradictions: list[tuple[int, ...]] = []
    for first, *later in groups.values():
        if all(_agree(problems[first], problems[other]) for other in later):
            duplicates += [(other, first) for other in later]
        else:
            contradictions.append((first, *later))
    return Repeats(tuple(duplicates), tuple(contradictions))


def report_repeats(
    problems: list[Problem], split: str, *, drop_duplicates: bool = False, drop_contradictions: bool = False
) -> list[Problem]:
    """Warn about repeated questions and return the problems to keep.

    Args:
        problems: Problems of one split, with final answers or without any.
        split: Name for the warning.
        drop_duplicates: Keep only the first of the problems that agree.
        drop_contradictions: Leave out every problem whose question has several answers, as the right one is unknown.
    """
    repeats = find_repeats(problems)
    if repeats.duplicates:
        later, first = repeats.duplicates[0]
        _warn(
            f"{len(repeats.duplicates)} of {len(problems)} {split} problems repeat an earlier question (first:"
            f" {problems[later].uid} repeats {problems[first].uid}).",
            "drop_duplicates",
            drop_duplicates,
        )
    if repeats.contradictions:
        first, other, *_ = _disagreeing(problems, repeats.contradictions[0])
        example = " and ".join(f"{problems[i].answer!r} in {problems[i].uid}" for i in (first, other))
        _warn(
            f"{len(repeats.contradictions)} {split} questions occur with different answers (first: {example}).",
            "drop_contradictions",
            drop_contradictions,
        )
    dropped: set[int] = set()
    if drop_duplicates:
        dropped.update(later for later, _ in repeats.duplicates)
    if drop_contradictions:
        dropped.update(position for group in repeats.contradictions for position in group)
    return [problem for position, problem in enumerate(problems) if position not in dropped]


def _disagreeing(problems: Sequence[Problem], group: Iterable[int]) -> list[int]:
    first, *later = group
    return [first, *(other for other in later if not _agree(problems[first], problems[other]))]


def _agree(first: Problem, second: Problem) -> bool:
    if first.answer is None or second.answer is None:
        return first.answer == second.answer
    return bool(same_answer(first.answer, second.answer))


def _warn(finding: str, setting: str, dropped: bool) -> None:
    consequence = (
        "They are left out." if dropped else f"They are kept; task.{setting}: true leaves them out of training."
    )
    warnings.warn(f"{finding} {consequence}", stacklevel=4)
