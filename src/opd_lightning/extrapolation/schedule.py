"""When to search: a predicate on the number of optimiser steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ScheduleSpec = Literal["powers_of_two", "adaptive", "rounds"] | int | Sequence[int]

FIRST_PAUSE, SHORTEST_PAUSE, LONGEST_PAUSE = 1, 2, 16  # optimiser steps between searches of the adaptive schedule


def next_pause(pause: int, *, accepted: bool) -> int:
    """Steps to the next search of the adaptive schedule: half as many after a success, twice as many after a failure.

    Args:
        pause: Steps before the last search.
        accepted: Whether it moved the weights.
    """
    return min(max(pause // 2 if accepted else pause * 2, SHORTEST_PAUSE), LONGEST_PAUSE)


@dataclass(frozen=True)
class Schedule:
    """The optimiser steps after which a search is due, counted from 1.

    Args:
        spec: "powers_of_two" (1, 2, 4, 8, ...: the paper), an integer n (n, 2n, 3n, ...), the steps themselves in
            increasing order, "adaptive": the first after step 1, then as `next_pause` says, or "rounds": when it is
            said that a round of rollouts has ended (`Extrapolator.ask`), and never of itself.

    Raises:
        ValueError: The schedule is none of these.
    """

    spec: ScheduleSpec = "powers_of_two"

    def __post_init__(self) -> None:
        if self.spec in ("powers_of_two", "adaptive", "rounds"):
            return
        if isinstance(self.spec, int) and not isinstance(self.spec, bool) and self.spec >= 1:
            return
        if isinstance(self.spec, Sequence) and not isinstance(self.spec, str) and self._is_list_of_steps(self.spec):
            object.__setattr__(self, "spec", tuple(self.spec))
            return
        raise ValueError(
            "schedule: expected 'powers_of_two', 'adaptive', 'rounds', an integer n >= 1 (search every n optimiser"
            f" steps) or an increasing list of steps >= 1, got {self.spec!r}."
        )

    @staticmethod
    def _is_list_of_steps(steps: Sequence[int]) -> bool:
        integers = all(isinstance(step, int) and not isinstance(step, bool) and step >= 1 for step in steps)
        return integers and len(steps) > 0 and list(steps) == sorted(set(steps))

    def num_due(self, step: int) -> int:
        """How many searches are due in the first `step` optimiser steps, where that is known beforehand."""
        if self.spec == "powers_of_two":
            return step.bit_length()
        if isinstance(self.spec, int):
            return step // self.spec
        assert not isinstance(self.spec, str)
        return bisect_right(self.spec, step)

    def is_due(self, settled: int, step: int, pause: int = FIRST_PAUSE) -> bool:
        """Whether a search falls due after step `settled` and not later than `step`.

        Args:
            settled: Step of the last search, or 0.
            step: Steps so far.
            pause: Of the adaptive schedule.
        """
        if self.spec == "rounds":
            return False
        if self.spec == "adaptive":
            return step - settled >= pause
        return self.num_due(step) > self.num_due(settled)
