"""The accept rule: which multiple of Delta to keep, given only a score per multiple."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Accept = Literal["not_worse", "better"]


@dataclass(frozen=True)
class Trial:
    """One scored point of the ray: `factor` multiples of Delta beyond the current weights."""

    factor: float
    score: float


@dataclass(frozen=True)
class SearchOutcome:
    """What a search tried and what it keeps.

    Attributes:
        baseline: Score of the current weights.
        trials: Every candidate scored, in the order tried.
        best: The point to keep; its factor is 0 when no candidate was accepted.
    """

    baseline: float
    trials: tuple[Trial, ...]
    best: Trial


@dataclass(frozen=True)
class LineSearch:
    """Walk along one ray and stop at the first candidate that fails (arXiv 2605.11739, section 4.1).

    The current weights are scored first. Candidates are tried in order and each is compared with the best point so
    far; the first failure ends the walk. When already the first forward candidate fails, the backward factors are
    walked in the same way. A score that is NaN or infinite is a failure; when the current weights themselves have such
    a score there is nothing to compare with and no candidate is tried.

    When every score of a search is the same number, the current weights are kept whatever `accept` says: the paper's
    rule would take the longest step on no evidence at all, and once more at the next search. A tie counts as "not
    worse" only where some other score shows that the score can tell points apart. Where the candidates are kept out
    by such a tie, the backward factors are not walked: none of the candidates failed.

    Args:
        candidates: Positive multiples of Delta, increasing.
        backward: Negative multiples, each further back than the one before; empty switches looking back off.
        accept: "not_worse" keeps a candidate that ties with the best so far (the paper), "better" does not (the
            authors' code).
        min_improvement: Amount by which a candidate must beat the best so far, in units of the score.

    Raises:
        ValueError: An argument is outside its range.
    """

    candidates: Sequence[float] = (2.0, 4.0, 6.0, 8.0, 10.0)
    backward: Sequence[float] = ()
    accept: Accept = "not_worse"
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        forward = _checked_factors("candidates", self.candidates, sign=1)
        if not forward:
            raise ValueError("candidates: expected at least one positive multiple of Delta, got an empty list.")
        object.__setattr__(self, "candidates", forward)
        object.__setattr__(self, "backward", _checked_factors("backward", self.backward, sign=-1))
        if self.accept not in ("not_worse", "better"):
            raise ValueError(f"accept: expected 'not_worse' or 'better', got {self.accept!r}.")
        if not (math.isfinite(self.min_improvement) and self.min_improvement >= 0):
            raise ValueError(f"min_improvement: expected a finite number of at least 0, got {self.min_improvement!r}.")

    def accepts(self, score: float, best: float) -> bool:
        """Whether a candidate with this score replaces the best point so far."""
        bar = best + self.min_improvement
        return math.isfinite(score) and (score >= bar if self.accept == "not_worse" else score > bar)

    def run(self, evaluate: Callable[[float], float]) -> SearchOutcome:
        """Search the ray.

        Args:
            evaluate: Returns the score at a multiple of Delta; called with 0 first (the current weights).
        """
        best = current = Trial(0.0, evaluate(0.0))
        trials: list[Trial] = []
        for ray in (self.candidates, self.backward) if math.isfinite(current.score) else ():
            for factor in ray:
                trials.append(Trial(factor, evaluate(factor)))
                if not self.accepts(trials[-1].score, best.score):
                    break
                best = trials[-1]
            if best is not current:
                break
        return SearchOutcome(current.score, tuple(trials), current if all_tie(current.score, trials) else best)


def all_tie(baseline: float, trials: Sequence[Trial]) -> bool:
    """Whether candidates were scored and each has exactly the score of the current weights."""
    return len(trials) > 0 and all(trial.score == baseline for trial in trials)


def _checked_factors(name: str, factors: Sequence[float], sign: int) -> tuple[float, ...]:
    values = tuple(float(factor) for factor in factors)
    towards = [sign * value for value in values]
    if not all(math.isfinite(value) and value > 0 for value in towards) or any(a >= b for a, b in pairwise(towards)):
        wanted = "positive, increasing" if sign > 0 else "negative, decreasing"
        raise ValueError(f"{name}: expected {wanted} multiples of Delta, got {list(values)}.")
    return values
