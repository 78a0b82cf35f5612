"""A calculator for the student of the short sandbox: it writes what stands behind every ``=``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from typing_extensions import override

from opd_lightning.interfaces import Problem, Tokenizer
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.tool_use import Tool
from opd_lightning.tasks.arithmetic import calculate

_CALL = re.compile(r"(?:^|;)([0-9]{1,3})([-+*])([0-9]{1,3})=\Z")


class Calculator(Tool):
    """Answers ``17+25=`` with ``42``, so that the student of `ArithmeticTask` only plans and copies.

    At times it is out of order and writes nothing, and the student must work the step out itself.

    Args:
        failure_rate: Share of calls that go unanswered, drawn from the seed of the turn.

    Raises:
        ValueError: It is no share.
    """

    def __init__(self, failure_rate: float = 0.0) -> None:
        if not 0 <= failure_rate <= 1:
            raise ValueError(f"tool.failure_rate: expected a share from 0 to 1, got {failure_rate}.")
        self.failure_rate = failure_rate

    @override
    def call_ids(self, tokenizer: Tokenizer) -> Sequence[int]:
        return [token_id for token, token_id in tokenizer.vocabulary.items() if token.endswith("=")]

    @override
    def answer(self, problem: Problem, text: str, seed: int) -> str | None:
        call = _CALL.search(text)
        if call is None or derive_seed("calculator", seed) < self.failure_rate * 2**63:
            return None
        return str(calculate(int(call[1]), call[2], int(call[3])))
