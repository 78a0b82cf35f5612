"""Which answers are not worth learning from: cut off, running in circles, in the wrong form, wrong, seen before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from opd_lightning.interfaces import Rollout

# The rules of the released script of arXiv 2604.13016 (section 4.1 of the paper is about what it made).
LINE_LENGTH, LINE_REPEATS = 20, 5  # characters at least, occurrences
WINDOW_LENGTH, WINDOW_STRIDE, WINDOW_REPEATS = 100, 10, 3
BLOCK_LENGTH, BLOCK_REPEATS, BLOCK_TEXT_LENGTH = 50, 3, 5000  # the last: only in texts longer than this


@dataclass(frozen=True)
class Rejection:
    r"""Rules for answers that are not kept.

    Args:
        truncated: Reject answers that were cut at `max_new_tokens`.
        repetitive: Reject answers that run in circles: a line of 20 characters or more occurs 5 times; one of the
            windows of 100 characters that begin at every tenth occurs 3 times; or, in texts of more than 5,000
            characters, a block of 50 stands three times in a row.
        pattern: Regular expression that must be found in an answer (``\\boxed\{``); None asks for nothing.
        wrong: Reject answers that the task does not mark as right. The paper does not.
        duplicates: Reject an answer to a problem whose tokens are those of another one that was kept.

    Raises:
        ValueError: The pattern is no regular expression.
    """

    truncated: bool = True
    repetitive: bool = True
    pattern: str | None = None
    wrong: bool = False
    duplicates: bool = True

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(
                f"reject.pattern: expected a regular expression, got {self.pattern!r} ({error}). Put a backslash in"
                " front of characters that are meant as such."
            ) from error

    def reason(self, rollout: Rollout, kept: Collection[tuple[int, ...]] = ()) -> str | None:
        """Why a graded answer is rejected, in one word or two; None for one to keep.

        Args:
            rollout: The answer.
            kept: Token ids of the answers to this problem that were kept before.
        """
        if self.truncated and not rollout.finished:
            return "truncated"
        if self.repetitive and is_repetitive(rollout.text):
            return "repetitive"
        if self.pattern is not None and re.search(self.pattern, rollout.text) is None:
            return "without pattern"
        if self.wrong and not rollout.reward >= 1:
            return "wrong"
        if self.duplicates and tuple(rollout.response_ids.tolist()) in kept:
            return "duplicate"
        return None


def is_repetitive(text: str) -> bool:
    """Whether a text runs in circles, by the three rules of the paper's script."""
    lines = (line.strip() for line in text.splitlines())
    if _most_common([line for line in lines if len(line) >= LINE_LENGTH]) >= LINE_REPEATS:
        return True
    starts = range(0, len(text) - WINDOW_LENGTH + 1, WINDOW_STRIDE)
    if _most_common([text[start : start + WINDOW_LENGTH] for start in starts]) >= WINDOW_REPEATS:
        return True
    return len(text) > BLOCK_TEXT_LENGTH and _has_block_in_a_row(text)


def _most_common(pieces: Sequence[str]) -> int:
    return max(Counter(pieces).values(), default=0)


def _has_block_in_a_row(text: str) -> bool:
    """A block stands n times in a row where n - 1 blocks' worth of characters equal those one block later."""
    equal = (left == right for left, right in zip(text, text[BLOCK_LENGTH:], strict=False))
    longest = max((sum(1 for _ in run) for is_equal, run in groupby(equal) if is_equal), default=0)
    return longest >= (BLOCK_REPEATS - 1) * BLOCK_LENGTH
