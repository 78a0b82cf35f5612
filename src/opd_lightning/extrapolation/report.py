"""What one search did, for people and for loggers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opd_lightning.extrapolation.line_search import Trial, all_tie


@dataclass(frozen=True)
class SearchReport:
    """What one search did.

    Attributes:
        step: Optimiser steps counted when it ran.
        baseline: Score of the weights it started from.
        trials: Every candidate scored, in the order tried.
        best: The point kept; its factor is 0 when no candidate was accepted.
        delta_norm: Euclidean norm of Delta over all moved weights.
        cosine: Cosine of this Delta with that of the search before; NaN for the first.
        seconds: Wall-clock time of the whole search.
        tokens: Tokens that the score spent over all processes, as far as it counts them.
    """

    step: int
    baseline: float
    trials: tuple[Trial, ...]
    best: Trial
    delta_norm: float
    cosine: float
    seconds: float
    tokens: int

    @property
    def accepted(self) -> bool:
        """Whether the weights were moved."""
        return self.best.factor != 0

    @property
    def tied(self) -> bool:
        """Whether every point scored alike, so that the search learned nothing and moved nothing."""
        return all_tie(self.baseline, self.trials)

    def metrics(self, prefix: str = "effopd") -> dict[str, float]:
        """Numbers for a logger, `effopd/factor` and so on; the cosine only when there is one."""
        numbers = {
            "factor": self.best.factor,
            "accepted": float(self.accepted),
            "tied": float(self.tied),
            "num_candidates": float(len(self.trials)),
            "score_before": self.baseline,
            "score_after": self.best.score,
            "delta_norm": self.delta_norm,
            "seconds": self.seconds,
            "tokens": float(self.tokens),
        }
        numbers |= {f"score_at/{trial.factor:+g}": trial.score for trial in self.trials}
        if not math.isnan(self.cosine):
            numbers["cosine"] = self.cosine
        return {f"{prefix}/{name}": number for name, number in numbers.items()}

    def outcome(self) -> str:
        """What became of it, in less than a line of 80 columns."""
        verdict = f"moved by {self.best.factor:+g} Delta" if self.accepted else "not moved"
        scores = f"score {self.baseline:.4g}" + (f" -> {self.best.score:.4g}" if self.accepted else "")
        return f"EffOPD step {self.step}: {verdict}{' (all tied)' if self.tied else ''}, {scores}"

    def __str__(self) -> str:
        tried = ", ".join(f"{trial.factor:+g}: {trial.score:.5g}" for trial in self.trials) or "none"
        verdict = f"moved by {self.best.factor:+g} Delta" if self.accepted else "not moved"
        if self.tied:
            verdict += ", since all scores tie, which says nothing about the direction"
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        cosine = "" if math.isnan(self.cosine) else f", cosine {self.cosine:+.2f}"
        return (
            f"EffOPD step {self.step}: {verdict} (score {self.baseline:.5g}; tried {tried}; "
            f"|Delta| {self.delta_norm:.3g}{cosine}; {self.seconds:.2f} s{tokens})"
        )
