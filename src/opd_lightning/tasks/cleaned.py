"""`CleanedTask`: any task without the training questions that repeat others or stand in evaluation sets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from opd_lightning.interfaces import Problem, Split, Task
from opd_lightning.tasks.around import TaskAround
from opd_lightning.tasks.near_duplicates import find_near_duplicates
from opd_lightning.tasks.overlap import find_overlap


class CleanedTask(TaskAround):
    """A task whose training questions are cleaned; everything else is that of the inner task.

    Left out are questions that nearly repeat an earlier one (`find_near_duplicates`), and those that stand in a
    held-out split word for word or nearly (`find_overlap`). How many is said in a warning, and which in the report.

    Args:
        inner: The task.
        near_duplicates: Least similarity, in (0, 1], at which a question counts as a repetition; None keeps them. Needs
            the extra `prompts`.
        held_out: Splits whose questions are not to be trained on.
        report: JSON file for the uid of every question left out, with the reason and the uid that it resembles.

    Raises:
        ValueError: A setting is out of range; from `problems`, nothing is left.
    """

    def __init__(
        self,
        inner: Task,
        near_duplicates: float | None = 0.8,
        held_out: Sequence[Split] = ("validation", "test"),
        report: str | None = None,
    ) -> None:
        if near_duplicates is not None and not 0 < near_duplicates <= 1:
            raise ValueError(f"task.near_duplicates: expected a number in (0, 1] or null, got {near_duplicates}.")
        if "train" in held_out:
            raise ValueError("task.held_out: expected splits other than train, which is the one that is cleaned.")
        super().__init__(inner)
        self.near_duplicates = near_duplicates
        self.held_out = tuple(held_out)
        self.report = report

    @override
    def problems(self, split: Split) -> list[Problem]:
        """The problems of the inner task; of the training split those that are left."""
        problems = self.inner.problems(split)
        if split != "train" or not problems:
            return problems
        dropped = self._find_dropped(problems)
        left = [problem for problem in problems if problem.uid not in dropped]
        if self.report is not None:
            Path(self.report).parent.mkdir(parents=True, exist_ok=True)
            Path(self.report).write_text(json.dumps(dropped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if dropped:
            reasons = [str(entry["reason"]) for entry in dropped.values()]
            counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
            where = f" (which: {self.report})" if self.report is not None else ""
            warnings.warn(
                f"{len(dropped)} of {len(problems)} training questions are left out: {counts}{where}.", stacklevel=2
            )
        if not left:
            raise ValueError(
                f"task.held_out: every one of the {len(problems)} training questions is in {', '.join(self.held_out)}."
                " Leave splits out, or train on others."
            )
        return left

    def _find_dropped(self, problems: Sequence[Problem]) -> dict[str, dict[str, str]]:
        """By uid: why, and what the question resembles."""
        dropped: dict[str, dict[str, str]] = {}
        for split in self.held_out:
            held_out = self.inner.problems(split)
            left = [problem for problem in problems if problem.uid not in dropped]
            while pairs := (found := find_overlap(left, held_out)).same + found.near:  # one for each question at a time
                for position, other in pairs:
                    entry = {"reason": f"in {split}", "resembles": held_out[position].uid}
                    dropped.setdefault(left[other].uid, entry)
                left = [problem for problem in left if problem.uid not in dropped]
        if self.near_duplicates is not None:
            left = [problem for problem in problems if problem.uid not in dropped]
            for later, first in find_near_duplicates(left, self.near_duplicates):
                dropped[left[later].uid] = {"reason": "near duplicates", "resembles": left[first].uid}
        return dropped
