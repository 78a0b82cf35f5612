"""`ScoredTask`: any task with the training questions that a measurement speaks for."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from typing_extensions import override

from opd_lightning.interfaces import Problem, Split, Task
from opd_lightning.interfaces.columns import as_number, check_where, matches
from opd_lightning.randomness import derive_seed
from opd_lightning.tasks.around import TaskAround
from opd_lightning.tasks.rows import read_rows

COLUMN = "scores"
Missing = Literal["refuse", "drop", "keep"]
Prefer = Literal["highest", "lowest", "middle"]


class ScoredTask(TaskAround):
    """A task with a file of scores, such as `opd-lightning diagnose` writes; chooses training questions by them.

    A row has the uid of a question and numbers about it. They become the column `scores` of the problem, for selectors
    (``where: {scores.reverse_kl: {"<": 1}}``, `Weighted`), whether or not anything is left out here. Held-out splits
    and marking are those of the inner task. What is kept is a function of the two files: no chance is in it.

    Where a row says which question its numbers are of (the column `question`), that is compared: scores of another
    data set, or of the same one asked in other words, are refused.

    Args:
        inner: The task.
        scores: File of scores, ending in .jsonl, .json, .parquet or .csv, with a column `uid`.
        where: Keep questions whose scores meet these conditions (``{teacher_gain: {">": 0}}``; see docs/data.md).
        rank_by: Score by which those that meet them are ranked; None keeps all of these.
        keep: Share of the ranked questions that is kept, in (0, 1]; at least one is.
        prefer: Which end of the ranking is kept: "highest", "lowest", or "middle" (nearest to the median).
        missing: What becomes of questions without a row: "refuse" the run, "drop" them, or "keep" them whatever the
            other settings say.

    Raises:
        ValueError: A setting cannot be understood; from `problems`, the scores do not fit or nothing is left.
    """

    def __init__(
        self,
        inner: Task,
        scores: str,
        where: dict[str, Any] | None = None,
        rank_by: str | None = None,
        keep: float = 1.0,
        prefer: Prefer = "highest",
        missing: Missing = "refuse",
    ) -> None:
        for name, value, known in (("prefer", prefer, get_args(Prefer)), ("missing", missing, get_args(Missing))):
            if value not in known:
                raise ValueError(f"task.{name}: expected one of {', '.join(known)}, got {value!r}.")
        if not 0 < keep <= 1:
            raise ValueError(f"task.keep: expected a share in (0, 1], got {keep}.")
        if keep < 1 and rank_by is None:
            raise ValueError(f"task.rank_by: keep={keep} needs a score to rank by, such as teacher_gain; got null.")
        super().__init__(inner)
        self.scores = scores
        self.where = where or {}
        check_where(self.where, "task")
        self.rank_by, self.keep, self.prefer, self.missing = rank_by, keep, prefer, missing

    @override
    def problems(self, split: Split) -> list[Problem]:
        """The problems of the inner task; of the training split those that are kept, with their scores.

        Raises:
            ValueError: Scores are missing or of other questions, or nothing is left.
        """
        problems = self.inner.problems(split)
        if split != "train" or not problems:
            return problems
        rows = read_scores(self.scores)
        known = [problem for problem in problems if problem.uid in rows]
        self._check_rows(problems, known, rows)
        passing = [problem for problem in known if matches(rows[problem.uid], self.where)]
        if not passing:
            raise ValueError(
                f"task.where: {self.where} leaves none of the {len(known)} training questions with scores. Columns of"
                f" {self.scores}: {', '.join(_numbers(rows.values()))}."
            )
        kept = {problem.uid for problem in self._best(passing, rows)}
        left = []
        for problem in problems:
            if problem.uid in kept:
                left.append(replace(problem, columns={**problem.columns, COLUMN: rows[problem.uid]}))
            elif problem.uid not in rows and self.missing == "keep":
                left.append(problem)
        if len(left) < len(problems):
            warnings.warn(
                f"{len(left)} of {len(problems)} training questions are kept by their scores in {self.scores}.",
                stacklevel=2,
            )
        return left

    def _check_rows(
        self, problems: Sequence[Problem], known: Sequence[Problem], rows: Mapping[str, Mapping[str, Any]]
    ) -> None:
        without = [problem.uid for problem in problems if problem.uid not in rows]
        if without and (self.missing == "refuse" or not known):
            remedy = "Score all of them, or set task.missing to drop or keep"
            raise ValueError(
                f"task.scores: {self.scores} has no row for {len(without)} of {len(problems)} training questions (the"
                f" first: {without[0]!r}). {remedy if known else 'Name the file of this data set'}."
            )
        for problem in known:
            if rows[problem.uid].get("question", question_digest(problem)) != question_digest(problem):
                raise ValueError(
                    f"task.scores: the row of {problem.uid!r} in {self.scores} is of another question, or of this one"
                    " in other words. Score this task's questions again (opd-lightning diagnose --parts prompts)."
                )

    def _best(self, problems: Sequence[Problem], rows: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
        """The share that is kept; of equal scores those that come first in the data."""
        if self.rank_by is None:
            return list(problems)
        values = [_number(rows[problem.uid].get(self.rank_by)) for problem in problems]
        known = sorted(value for value in values if value is not None)
        if not known:
            raise ValueError(
                f"task.rank_by: no row of {self.scores} has a number in the column {self.rank_by!r}. Columns with"
                f" numbers: {', '.join(_numbers(rows.values())) or 'none'}."
            )
        middle = known[len(known) // 2]
        ranked = sorted((_cost(value, middle, self.prefer), i) for i, value in enumerate(values) if value is not None)
        return [problems[place] for _, place in ranked[: max(1, round(self.keep * len(ranked)))]]


def _cost(value: float, middle: float, prefer: Prefer) -> float:
    """Smallest where a question is wanted most."""
    if prefer == "middle":
        return abs(value - middle)
    return -value if prefer == "highest" else value


def question_digest(problem: Problem) -> str:
    """Stands for what is asked, word for word."""
    return f"{derive_seed(json.dumps([dict(message) for message in problem.messages])):016x}"


def read_scores(path: str) -> dict[str, Mapping[str, Any]]:
    """The rows of a file of scores by uid.

    Raises:
        ValueError: The file cannot be read, or a row has no uid or that of another one.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    for place, row in read_rows(path):
        if isinstance(row, str) or not isinstance(row.get("uid"), str):
            found = row if isinstance(row, str) else f"columns are {', '.join(map(str, row)) or 'none'}."
            raise ValueError(f"task.scores: {path}, {place}: expected a row with the column 'uid'; {found}")
        if row["uid"] in rows:
            raise ValueError(f"task.scores: {path}, {place}: {row['uid']!r} has a row already. Leave one of them out.")
        rows[row["uid"]] = row
    return rows


def _number(value: Any) -> float | None:
    """The number of a column, if it can be ranked."""
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


def _numbers(rows: Any) -> list[str]:
    """Names of the columns that hold a number somewhere."""
    return sorted({str(name) for row in rows for name, value in row.items() if _number(value) is not None})
