"""The sums of the sandbox in more than one notation and more than one template: the task of the zoo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from typing_extensions import override

from opd_lightning.interfaces import Problem, Split
from opd_lightning.tasks.arithmetic import ArithmeticTask, solve

Template = Literal["plain", "question"]
TEMPLATES: dict[Template, str] = {"plain": "{}=", "question": "Q: {}?"}
OTHER_SIGNS = {"+": "p", "-": "m", "*": "x", "=": ">", ";": ","}

_LAST_NUMBER = re.compile(r"#([0-9]{1,4})\Z")


class NotationTask(ArithmeticTask):
    """The problems of `ArithmeticTask`, marked by the number after the last ``#``, whatever stands before it.

    So two ways of laying out the work count alike, as they do where only the boxed answer is looked at.

    Args:
        template: How a sum is asked: "plain" is ``17+25=``, "question" is ``Q: 17+25?``.
        num_train: Training problems.
        num_validation: Validation problems.
        num_test: Test problems.
        levels: Levels in 1..4, dealt out in turn.
        seed: Seed of the problems.

    Raises:
        ValueError: The template is unknown, or a number is refused by `ArithmeticTask`.
    """

    def __init__(
        self,
        template: Template = "plain",
        num_train: int = 4096,
        num_validation: int = 256,
        num_test: int = 256,
        levels: Sequence[int] = (1, 2, 3, 4),
        seed: int = 0,
    ) -> None:
        super().__init__(num_train, num_validation, num_test, levels, seed)
        if template not in TEMPLATES:
            raise ValueError(f"template: expected one of {', '.join(get_args(Template))}, got {template!r}.")
        self.template: Template = template
        self.levels = tuple(levels)

    @override
    def problems(self, split: Split) -> list[Problem]:
        return [
            replace(problem, messages=({"role": "user", "content": ask(expression_of(problem), self.template)},))
            for problem in super().problems(split)
        ]

    @override
    def grade(self, problem: Problem, response: str) -> float:
        found = _LAST_NUMBER.search(response)
        return float(found is not None and found[1] == problem.answer)


def expression_of(problem: Problem) -> str:
    """The sum that a problem asks for, such as ``17+25-8``."""
    return problem.uid.removeprefix("arithmetic/")


def ask(expression: str, template: Template) -> str:
    """The question, such as ``17+25-8=``."""
    return TEMPLATES[template].format(expression)


def solve_otherwise(expression: str) -> str:
    """Work an expression out with other signs in the steps: ``17+25-8`` gives ``17p25>42,42m8>34,#34``."""
    return solve(expression).translate(str.maketrans("".join(OTHER_SIGNS), "".join(OTHER_SIGNS.values())))
