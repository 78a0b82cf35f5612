"""The task of the long sandbox: running balances, booked line by line, checkable by eye and by rule."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from typing_extensions import override

from opd_lightning.tasks.made_up import MadeUpTask

SIGNS = "+-+-"  # of the four sections
NUM_LEVELS = 2

_TERM = re.compile(r"[-+][0-9]{2}")
_ANSWER_SHEET = re.compile(r"(?:[0-9]{2}[-+][0-9]{2}=[0-9]{2};){1,40}#([0-9]{2})")


class LedgerTask(MadeUpTask):
    """Balances of four sections, booked line by line: ``16+23+...=`` wants ``16+23=39;39+11=50;...;#10``.

    A ledger of level l has 2 + l entries in each of four sections: receipts, payments, receipts, payments. No entry
    occurs twice. Balances have two digits and wrap around modulo 100. In the sandbox tokenizer, where one character is
    one token, an answer takes 112 (level 1) or 148 (level 2) response tokens, the closing token included.
    Problems differ within and between the splits; the ``predict`` split is the ``test`` split. Drawing more training
    problems changes neither the validation and test problems nor the earlier training problems.
    Every problem has the columns ``level`` and ``solution`` (all lines).

    Args:
        num_train: Training problems.
        num_validation: Validation problems.
        num_test: Test problems.
        levels: Levels in 1..2, dealt out in turn.
        seed: Seed of the problems.

    Raises:
        ValueError: A size is negative, a level is unknown, or more than 500,000 problems are asked for.
    """

    name = "ledger"
    num_levels = NUM_LEVELS
    most = 500_000
    answer_sheet = _ANSWER_SHEET

    def __init__(
        self,
        num_train: int = 8192,
        num_validation: int = 256,
        num_test: int = 256,
        levels: Sequence[int] = (1,),
        seed: int = 0,
    ) -> None:
        super().__init__(num_train, num_validation, num_test, levels, seed)

    @staticmethod
    @override
    def draw(rng: random.Random, level: int) -> str:
        return draw_ledger(rng, level)

    @staticmethod
    @override
    def solve(question: str) -> str:
        return solve_ledger(question)


def draw_ledger(rng: random.Random, level: int) -> str:
    """Draw an opening balance and its entries, such as ``16+23+11+14-19-...``."""
    num_entries = 2 + level  # in each section
    amounts = range(10, 79 // num_entries + 1)
    ledger = str(rng.randint(10, 20))
    receipts, payments = rng.sample(amounts, 2 * num_entries), rng.sample(amounts, 2 * num_entries)
    for sign in SIGNS:
        pool = receipts if sign == "+" else payments
        ledger += "".join(f"{sign}{pool.pop(0)}" for _ in range(num_entries))
    return ledger


def split_ledger(ledger: str) -> tuple[int, list[str]]:
    """Split ``16+23-19`` into 16 and ["+23", "-19"]."""
    return int(ledger[:2]), _TERM.findall(ledger)


def book(balance: int, entry: str) -> int:
    """The balance after an entry such as ``+23``."""
    return (balance + int(entry)) % 100


def solve_ledger(ledger: str) -> str:
    """Book all entries: ``16+23-19`` gives ``16+23=39;39-19=20;#20``."""
    balance, entries = split_ledger(ledger)
    written = ""
    for entry in entries:
        result = book(balance, entry)
        written += f"{balance:02d}{entry}={result:02d};"
        balance = result
    return f"{written}#{balance:02d}"
