"""Held-out questions that also stand in the training data, word for word or nearly: counted and reported."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from opd_lightning.interfaces import Problem

RUN_LENGTH = 5  # words
NEAR = 0.6
FEWEST_RUNS = 16  # of shorter questions, the same with one number changed would count as near

_WORD = re.compile(r"\w+|[^\w\s]")

Run = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Pairs (held-out position, training position), at most one for each held-out question.

    Attributes:
        same: Questions with the same words.
        near: Questions that one training question nearly contains.
    """

    same: tuple[tuple[int, int], ...]
    near: tuple[tuple[int, int], ...]


def find_overlap(train: Sequence[Problem], held_out: Sequence[Problem]) -> Overlap:
    """Find held-out questions that training shows, in time linear in the text.

    Questions are compared as words and single marks, in lower case. Near: one training question holds at least 60% of
    the held-out question's runs of five words, and these are at least 16. Runs that many training questions share (more
    than 1 in 20, or than 100) are instructions and do not count.
    """
    questions = [question_words(problem) for problem in held_out]
    positions: dict[Run, int] = {}
    runs_of: list[set[Run]] = [set(_runs(words)) for words in questions]
    asked: set[Run] = set().union(*runs_of)
    seen_in: dict[Run, list[int]] = defaultdict(list)
    for position, problem in enumerate(train):
        words = question_words(problem)
        positions.setdefault(words, position)
        for run in asked.intersection(_runs(words)):
            seen_in[run].append(position)
    most = max(3, min(100, len(train) // 20))
    same, near = [], []
    for position, (words, runs) in enumerate(zip(questions, runs_of, strict=True)):
        if words in positions:
            same.append((position, positions[words]))
            continue
        own = [run for run in runs if len(seen_in.get(run, ())) <= most]
        shared = Counter(other for run in own for other in seen_in.get(run, ()))
        if len(own) >= FEWEST_RUNS and shared:
            other, count = max(shared.items(), key=lambda item: (item[1], -item[0]))
            if count >= NEAR * len(own):
                near.append((position, other))
    return Overlap(tuple(same), tuple(near))


def report_overlap(train: Sequence[Problem], held_out: Sequence[Problem], split: str) -> None:
    """Warn about held-out questions that are also trained on.

    Args:
        train: Training problems.
        held_out: Problems of another split.
        split: Its name, for the warning.
    """
    overlap = find_overlap(train, held_out)
    if pairs := overlap.same + overlap.near:
        position, other = pairs[0]
        warnings.warn(
            f"{len(pairs)} of {len(held_out)} {split} questions are also in the training data"
            f" ({len(overlap.same)} word for word, {len(overlap.near)} nearly; first: {held_out[position].uid} and"
            f" {train[other].uid}). Their score says little about unseen questions; leave them out of one of the two.",
            stacklevel=2,
        )


def question_words(problem: Problem) -> Run:
    """What is asked, as words and single marks in lower case."""
    text = unicodedata.normalize("NFKC", " ".join(message["content"] for message in problem.messages))
    return tuple(_WORD.findall(text.casefold()))


def _runs(words: Run) -> zip[Run]:
    return zip(*(words[start:] for start in range(RUN_LENGTH)), strict=False)
