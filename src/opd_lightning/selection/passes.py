"""Streams over all problems: in order or shuffled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opd_lightning.interfaces import Problem, PromptSelector
from opd_lightning.randomness import derive_seed


class _Stream(PromptSelector):
    """Endless stream over all problems; its whole state is the number of problems drawn."""

    def __init__(self) -> None:
        self._num_problems = 0
        self._position = 0

    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the problems and start at the first draw."""
        assert problems, "a selector needs at least one problem"
        self._num_problems, self._seed, self._position = len(problems), seed, 0

    @property
    def epoch_length(self) -> int:
        """Number of problems."""
        return self._num_problems

    def select(self, num_problems: int) -> list[int]:
        """Indices of the next problems; more than there are means passing over them again."""
        assert self._num_problems, "setup comes first"
        draws = range(self._position, self._position + num_problems)
        self._position += num_problems
        return [self._draw(*divmod(draw, self._num_problems)) for draw in draws]

    @abstractmethod
    def _draw(self, epoch: int, place: int) -> int:
        """Index of the problem at a place of a pass."""

    def state_dict(self) -> dict[str, Any]:
        """Number of problems drawn so far."""
        return {"num_problems": self._num_problems, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: The state belongs to another number of problems.
        """
        check_num_problems(state, self._num_problems)
        self._position = int(state["position"])


class InOrder(_Stream):
    """The problems in the order of the data, again and again."""

    def _draw(self, epoch: int, place: int) -> int:
        return place


class Shuffled(_Stream):
    """The problems in a new random order in every pass; none is left out, none comes twice in a pass."""

    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the problems and start at the first draw."""
        super().setup(problems, seed)
        self._shuffled_epoch = -1

    def _draw(self, epoch: int, place: int) -> int:
        if epoch != self._shuffled_epoch:
            self._order, self._shuffled_epoch = self._order_of(epoch), epoch
        return self._order[place]

    def _order_of(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "selection", epoch))
        order: list[int] = torch.randperm(self._num_problems, generator=generator).tolist()
        return order


def check_num_problems(state: Mapping[str, Any], num_problems: int) -> None:
    """Refuse a selector's state that belongs to another number of problems.

    Raises:
        ValueError: It does.
    """
    if state["num_problems"] != num_problems:
        raise ValueError(
            f"selector: the checkpoint was written with {state['num_problems']} training problems, this run has"
            f" {num_problems}. Resume with the same data and filters, or start a new run from the checkpoint's weights."
        )
