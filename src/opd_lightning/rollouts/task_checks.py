"""What a task gives is checked where it enters: its problems once per split, its grades after each marking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

from opd_lightning.interfaces import Problem, Rollout, Split, Task


def check_problems(task: Task, split: Split) -> list[Problem]:
    """Ask a task for the problems of a split, and check them.

    Raises:
        ValueError: There are none, or they are not a list of problems with different uids, chat messages, and answers
            where the task marks some. The message names the task's class.
    """
    who = f"data.task: {type(task).__name__}.problems({split!r})"
    problems: Any = task.problems(split)
    if not isinstance(problems, list | tuple):
        raise ValueError(f"{who}: expected a list of Problem, got {_shorten(problems)}. Return a list.")
    if not problems:
        skip = " or set trainer.limit_val_batches: 0" if split == "validation" else ""
        raise ValueError(
            f"data.task: {type(task).__name__} has no problems in its {split!r} split. Give it some{skip}."
        )
    places: dict[str, int] = {}
    for place, problem in enumerate(problems):
        if not isinstance(problem, Problem):
            raise ValueError(f"{who}[{place}]: expected a Problem, got {_shorten(problem)}.")
        if fault := _fault(problem, is_graded=task.can_grade(problem)):
            raise ValueError(f"{who}[{place}]{fault}")
        if problem.uid in places:
            raise ValueError(
                f"{who}[{place}].uid: {problem.uid!r} is also the uid of problem {places[problem.uid]}. Give every"
                " problem of a split its own, for example its number."
            )
        places[problem.uid] = place
    return list(problems)


def check_grades(task: Task, rollouts: Sequence[Rollout], grades: Any) -> list[float]:
    """Turn what a task's marking gave into one number from 0 to 1 per rollout.

    Raises:
        ValueError: It is something else. The message names the task's class.
    """
    name = type(task).__name__
    by_one = type(task).grade_rollouts is Task.grade_rollouts
    who = f"data.task: {name}.{'grade' if by_one else 'grade_rollouts'}"
    if not isinstance(grades, list | tuple) or len(grades) != len(rollouts):
        came = f"{len(grades)}" if isinstance(grades, list | tuple) else _shorten(grades)
        raise ValueError(f"{who}: expected a list of {len(rollouts)} grades, one for each rollout, got {came}.")
    for grade, rollout in zip(grades, rollouts, strict=True):
        if not 0 <= _number(grade) <= 1:
            raise ValueError(
                f"{who}: expected a number from 0 (wrong) to 1 (right) for a response to problem"
                f" {rollout.problem.uid!r}, got {_shorten(grade)}. Return such a number for every response."
            )
    return [_number(grade) for grade in grades]


def _fault(problem: Problem, *, is_graded: bool) -> str | None:
    """What is wrong with a problem, or None."""
    uid, messages, answer = problem.uid, problem.messages, problem.answer
    if not isinstance(uid, str) or not uid:
        return f".uid: expected a name, got {_shorten(uid)}."
    if not isinstance(messages, list | tuple) or not messages:
        return (
            f".messages: expected chat messages such as ({{'role': 'user', 'content': '...'}},), got"
            f" {_shorten(messages)}."
        )
    for message in messages:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            return f".messages: expected messages with a role and a content, both text, got {_shorten(message)}."
    if len(messages) > 1 and any(message["role"] == "raw" for message in messages):
        return ".messages: a message with the role 'raw' is the whole prompt; it must be the only one."
    if answer is None and is_graded:
        return (
            ".answer is None, but the task marks answers. Give the reference as text ('' where marking needs none), or"
            " override neither grade nor grade_rollouts."
        )
    if answer is not None and not isinstance(answer, str):
        return f".answer: expected text{'' if is_graded else ' or None'}, got {_shorten(answer)}."
    return None


def _number(grade: Any) -> float:
    """A grade as a number; NaN for what is none."""
    if not isinstance(grade, SupportsFloat) or getattr(grade, "ndim", 0) > 0:
        return math.nan
    return float(grade)


def _shorten(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
