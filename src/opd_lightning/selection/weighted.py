"""`Weighted`: prompts by a number that is known of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from opd_lightning.interfaces import Problem
from opd_lightning.interfaces.columns import look_up
from opd_lightning.randomness import derive_seed
from opd_lightning.selection.passes import Shuffled


class Weighted(Shuffled):
    """Each problem as often as its weight says, each pass in a new random order.

    A pass has as many draws as there are problems. The weights are laid end to end in a random order and probed in
    equal steps (systematic sampling), so a problem with w times the mean weight comes w times in a pass, rounded up or
    down by chance: with equal weights each comes once.

    Args:
        column: Column of the problems with the weight, a number of at least 0: ``scores.teacher_gain`` under
            `ScoredTask`.
        least: Smaller weights are raised to this one, so that a problem is not left out for good (or a negative number
            refused); None takes them as they are.

    Raises:
        ValueError: `least` is negative; from `setup`, a problem has no such number, or all weights are 0.
    """

    def __init__(self, column: str, least: float | None = None) -> None:
        super().__init__()
        if least is not None and not 0 <= least < math.inf:
            raise ValueError(f"selector.least: expected a number of at least 0 or null, got {least}.")
        self.column = column
        self.least = least

    @override
    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the problems and their weights.

        Raises:
            ValueError: A weight is missing or negative, or all are 0.
        """
        super().setup(problems, seed)
        weights = torch.tensor([self._weight(problem) for problem in problems], dtype=torch.float64)
        if not weights.any():
            raise ValueError(f"selector.column: every weight in {self.column!r} is 0. Set selector.least above 0.")
        self._weights = weights / weights.sum() * len(problems)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Number of problems drawn so far, and the weights they are drawn by."""
        return super().state_dict() | {"weights": self._weights.clone()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: The state belongs to other problems or other weights.
        """
        super().load_state_dict(state)
        if not torch.equal(state["weights"], self._weights):
            raise ValueError(
                f"selector.column: the weights in {self.column!r} are not those of the checkpoint. Resume with the same"
                " file of scores, or start a new run from the checkpoint's weights."
            )

    @override
    def _order_of(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "weighted", epoch))
        layout = torch.randperm(len(self._weights), generator=generator)
        ends = self._weights[layout].cumsum(0)
        probes = torch.arange(len(layout), dtype=torch.float64) + torch.rand(
            1, generator=generator, dtype=torch.float64
        )
        # the last end may be rounded to below the last probe
        drawn = layout[torch.searchsorted(ends, probes, right=True).clamp(max=len(layout) - 1)]
        order: list[int] = drawn[torch.randperm(len(layout), generator=generator)].tolist()
        return order

    def _weight(self, problem: Problem) -> float:
        value = look_up(problem.columns, self.column)
        try:
            weight = float(value)
        except (TypeError, ValueError):
            weight = math.nan
        if self.least is not None:
            weight = max(weight, self.least)
        if isinstance(value, bool) or not 0 <= weight < math.inf:
            raise ValueError(
                f"selector.column: expected a number of at least 0 in {self.column!r} of problem {problem.uid!r}, got"
                f" {'nothing' if math.isnan(weight) else weight}; its columns are"
                f" {', '.join(map(str, problem.columns)) or 'none'}. Set selector.least to raise negative ones, or"
                " leave problems without a number out (ScoredTask.where)."
            )
        return weight
