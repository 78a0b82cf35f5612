"""When to search: a predicate on the number of optimiser steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ScheduleSpec = Literal["powers_of_two"] | int | Sequence[int]


@dataclass(frozen=True)
class Schedule:
    """The optimiser steps after which a search is due, counted from 1.

    Args:
        spec: "powers_of_two" (1, 2, 4, 8, ...: the paper), an integer n (n, 2n, 3n, ...), or the steps themselves in
            increasing order.

    Raises:
        ValueError: The schedule is none of these.
    """

    spec: ScheduleSpec = "powers_of_two"

    def __post_init__(self) -> None:
        if self.spec == "powers_of_two":
            return
        if isinstance(self.spec, int) and not isinstance(self.spec, bool) and self.spec >= 1:
            return
        if isinstance(self.spec, Sequence) and not isinstance(self.spec, str) and self._is_list_of_steps(self.spec):
            object.__setattr__(self, "spec", tuple(self.spec))
            return
        raise ValueError(
            "schedule: expected 'powers_of_two', an integer n >= 1 (search every n optimiser steps) or an increasing "
            f"list of steps >= 1, got {self.spec!r}."
        )

    @staticmethod
    def _is_list_of_steps(steps: Sequence[int]) -> bool:
        integers = all(isinstance(step, int) and not isinstance(step, bool) and step >= 1 for step in steps)
        return integers and len(steps) > 0 and list(steps) == sorted(set(steps))

    def num_due(self, step: int) -> int:
        """How many searches are due in the first `step` optimiser steps."""
        if self.spec == "powers_of_two":
            return step.bit_length()
        if isinstance(self.spec, int):
            return step // self.spec
        assert not isinstance(self.spec, str)
        return bisect_right(self.spec, step)

    def is_due(self, settled: int, step: int) -> bool:
        """Whether a search falls due after step `settled` and not later than `step`."""
        return self.num_due(step) > self.num_due(settled)
