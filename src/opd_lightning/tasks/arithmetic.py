"""The sandbox task: sums worked out one step at a time, checkable by eye and by rule."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from typing_extensions import override

from opd_lightning.tasks.made_up import MadeUpTask

NUM_LEVELS = 4
LARGEST_NUMBER = 99

_TERM = re.compile(r"([-+*])([0-9]+)")
_ANSWER_SHEET = re.compile(r"(?:[0-9]{1,4}[-+*][0-9]{1,4}=[0-9]{1,4};){1,16}#([0-9]{1,4})")


class ArithmeticTask(MadeUpTask):
    """Sums of two-digit numbers, answered in visible steps: ``17+25-8=`` wants ``17+25=42;42-8=34;#34``.

    A problem of level l has l + 1 operations, worked from left to right; only the first may be a product, so the usual
    precedence gives the same answer. No number leaves 0..99. In the sandbox tokenizer, where one character is one
    token, a worked solution takes 16 to 49 response tokens, the closing token included.
    Problems differ within and between the splits; the ``predict`` split is the ``test`` split. Drawing more training
    problems changes neither the validation and test problems nor the earlier training problems.
    Every problem has the columns ``level`` and ``solution`` (the worked solution).

    Args:
        num_train: Training problems.
        num_validation: Validation problems.
        num_test: Test problems.
        levels: Levels in 1..4, dealt out in turn.
        seed: Seed of the problems.

    Raises:
        ValueError: A size is negative, a level is unknown, or more problems are asked for than are sure to differ.
    """

    name = "arithmetic"
    num_levels = NUM_LEVELS
    most = 50_000
    answer_sheet = _ANSWER_SHEET

    def __init__(
        self,
        num_train: int = 4096,
        num_validation: int = 256,
        num_test: int = 256,
        levels: Sequence[int] = (1, 2, 3, 4),
        seed: int = 0,
    ) -> None:
        super().__init__(num_train, num_validation, num_test, levels, seed)

    @staticmethod
    @override
    def draw(rng: random.Random, level: int) -> str:
        return draw_expression(rng, level)

    @staticmethod
    @override
    def solve(question: str) -> str:
        return solve(question)


def draw_expression(rng: random.Random, level: int) -> str:
    """Draw the left side of a sum, such as ``17+25-8``, with level + 1 operations whose results all lie in 0..99."""
    if rng.random() < 0.25:
        factor = rng.randint(2, 9)
        first = rng.randint(10, LARGEST_NUMBER // factor)
        value, expression, num_left = first * factor, f"{first}*{factor}", level
    else:
        value = rng.randint(10, LARGEST_NUMBER)
        expression, num_left = str(value), level + 1
    for _ in range(num_left):
        adds = rng.random() * LARGEST_NUMBER >= value
        number = rng.randint(1, LARGEST_NUMBER - value if adds else value)
        value += number if adds else -number
        expression += f"{'+' if adds else '-'}{number}"
    return expression


def calculate(left: int, sign: str, right: int) -> int:
    """Return left + right, left - right or left * right."""
    return left * right if sign == "*" else left + right if sign == "+" else left - right


def split_expression(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """Split ``17+25-8`` into 17 and [("+", 25), ("-", 8)]."""
    terms = _TERM.findall(expression)
    first = expression[: len(expression) - sum(1 + len(number) for _, number in terms)]
    return int(first), [(sign, int(number)) for sign, number in terms]


def solve(expression: str) -> str:
    """Work an expression out from left to right: ``17+25-8`` gives ``17+25=42;42-8=34;#34``."""
    value, terms = split_expression(expression)
    steps = []
    for sign, number in terms:
        result = calculate(value, sign, number)
        steps.append(f"{value}{sign}{number}={result};")
        value = result
    return "".join(steps) + f"#{value}"
