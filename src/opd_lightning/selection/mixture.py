"""`Mixture`: several sources in fixed shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.interfaces import Problem, PromptSelector
from opd_lightning.randomness import derive_seed
from opd_lightning.selection.passes import Shuffled, check_num_problems

# 2^64 divided by the golden ratio: steps of this size spread over [0, 2^64) more evenly than any other.
_GOLDEN_STEP = 0x9E3779B97F4A7C15


class Mixture(PromptSelector):
    """Several sources in fixed shares, each one shuffled.

    The source of draw k is where k golden-ratio steps (from an offset given by the seed) land among the weights laid
    end to end, so the number of draws of a source stays within a few of its exact share at every moment.

    Args:
        weights: Weight of each source by name; they need not sum to 1, and 0 leaves a source out. Every source of the
            data must be named.

    Raises:
        ValueError: A weight is negative or not finite, or none is positive; from `setup`, names do not fit the data.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        if any(not (math.isfinite(weight) and weight >= 0) for weight in weights.values()) or not any(weights.values()):
            raise ValueError(
                f"selector.weights: expected numbers of at least 0 by source name, one of them positive, got {weights}."
            )
        self.weights = weights

    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Split the problems by source.

        Raises:
            ValueError: A weight names no source of the data, or a source has no weight.
        """
        sources = sorted({problem.source for problem in problems})
        unknown, unnamed = sorted(set(self.weights) - set(sources)), sorted(set(sources) - set(self.weights))
        if unknown or unnamed:
            finding = f"{unknown[0]!r} is not a source" if unknown else f"{unnamed[0]!r} has no weight (0 drops it)"
            raise ValueError(f"selector.weights: {finding}. The data has the sources: {', '.join(sources)}.")
        self._num_problems, self._position = len(problems), 0
        self._offset = derive_seed(seed, "mixture")
        self._members: dict[str, list[int]] = {}
        self._streams: dict[str, Shuffled] = {}
        for name in sources:
            if self.weights[name] == 0:
                continue
            self._members[name] = [i for i, problem in enumerate(problems) if problem.source == name]
            self._streams[name] = Shuffled()
            self._streams[name].setup([problems[i] for i in self._members[name]], derive_seed(seed, "mixture", name))

    @property
    def epoch_length(self) -> int:
        """Number of problems in the sources with a positive weight."""
        return sum(map(len, self._members.values()))

    def select(self, num_problems: int) -> list[int]:
        """Indices of the next problems."""
        indices = []
        for draw in range(self._position, self._position + num_problems):
            name = self._source(draw)
            indices += [self._members[name][i] for i in self._streams[name].select(1)]
        self._position += num_problems
        return indices

    def _source(self, draw: int) -> str:
        place = (self._offset + draw * _GOLDEN_STEP) % 2**64 / 2**64 * sum(self.weights[name] for name in self._streams)
        for name in self._streams:
            place -= self.weights[name]
            if place < 0:
                return name
        return name

    def state_dict(self) -> dict[str, Any]:
        """Number of draws in all and from each source."""
        streams = {name: stream.state_dict() for name, stream in self._streams.items()}
        return {"num_problems": self._num_problems, "position": self._position, "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: The state belongs to other sources or another number of problems.
        """
        check_num_problems(state, self._num_problems)
        if set(state["streams"]) != set(self._streams):
            raise ValueError(
                f"selector.weights: the checkpoint mixes {', '.join(state['streams'])}, this run"
                f" {', '.join(self._streams)}. Resume with the same sources, or start a new run from the checkpoint's"
                " weights."
            )
        for name, stream in self._streams.items():
            stream.load_state_dict(state["streams"][name])
        self._position = int(state["position"])
