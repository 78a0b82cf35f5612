"""Tasks whose problems are drawn by a rule and solved by a rule: those of the sandboxes."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from opd_lightning.interfaces import Problem, Split, Task


class MadeUpTask(Task):
    """Problems drawn from a seed, with a written solution that ends in ``#`` and the answer.

    Problems differ within and between the splits; the ``predict`` split is the ``test`` split. Drawing more training
    problems changes neither the validation and test problems nor the earlier training problems.
    Every problem has the columns ``level`` and ``solution`` (the written solution).

    Args:
        num_train: Training problems.
        num_validation: Validation problems.
        num_test: Test problems.
        levels: Levels, dealt out in turn.
        seed: Seed of the problems.

    Attributes:
        name: Of the problems' source.
        num_levels: Levels are 1 to this.
        most: As many problems are sure to differ.
        answer_sheet: A whole response in the right form; its only group is the answer.

    Raises:
        ValueError: A size is negative, a level is unknown, or more than `most` problems are asked for.
    """

    name: ClassVar[str]
    num_levels: ClassVar[int]
    most: ClassVar[int]
    answer_sheet: ClassVar[re.Pattern[str]]

    def __init__(self, num_train: int, num_validation: int, num_test: int, levels: Sequence[int], seed: int) -> None:
        sizes = {"test": num_test, "validation": num_validation, "train": num_train}
        for split, size in sizes.items():
            if size < 0:
                raise ValueError(f"num_{split}: expected 0 or more problems, got {size}.")
        if not levels or any(level not in range(1, self.num_levels + 1) for level in levels):
            raise ValueError(f"levels: expected at least one level out of 1 to {self.num_levels}, got {list(levels)}.")
        if sum(sizes.values()) > self.most:
            raise ValueError(
                f"num_train + num_validation + num_test: expected at most {self.most} problems, got"
                f" {sum(sizes.values())}; ask for fewer."
            )
        taken: set[str] = set()
        self._problems = {
            split: self._draw_problems(random.Random(f"{seed}/{split}"), size, levels, taken)
            for split, size in sizes.items()
        }

    @staticmethod
    @abstractmethod
    def draw(rng: random.Random, level: int) -> str:
        """A question without its closing ``=``."""

    @staticmethod
    @abstractmethod
    def solve(question: str) -> str:
        """The written solution."""

    @override
    def problems(self, split: Split) -> list[Problem]:
        """All problems of a split, in a fixed order."""
        return list(self._problems["test" if split == "predict" else split])

    @override
    def grade(self, problem: Problem, response: str) -> float:
        """Return 1 when the response has the right form and ends in the right answer, as the reference writes it.

        Only that is marked, as what comes before is for the reader.
        """
        sheet = self.answer_sheet.fullmatch(response)
        return float(sheet is not None and sheet[1] == problem.answer)

    def _draw_problems(
        self, rng: random.Random, num_problems: int, levels: Sequence[int], taken: set[str]
    ) -> list[Problem]:
        problems = []
        for index in range(num_problems):
            level = levels[index % len(levels)]
            question = self.draw(rng, level)
            while question in taken:
                question = self.draw(rng, level)
            taken.add(question)
            solution = self.solve(question)
            problems.append(
                Problem(
                    uid=f"{self.name}/{question}",
                    messages=({"role": "user", "content": f"{question}="},),
                    answer=solution.rpartition("#")[2],
                    source=self.name,
                    columns={"level": level, "solution": solution},
                )
            )
        return problems
