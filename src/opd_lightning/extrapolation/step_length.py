"""How long a step should be: a one-dimensional search over its multiples, given only a score per multiple."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

GROWTH = 10.0  # between the multiples of the first, coarse walk
MAX_DECADES = 8  # of that walk, in either direction
CLOSE_ENOUGH = 1.25  # ratio between the best multiple and the next one worth a score
WIDE = 3.0  # a longer step that was worse, but so many times longer than the best, does not yet end the search
MAX_REFINEMENTS = 4


@dataclass(frozen=True)
class ScaledStep:
    """One scored point: the weights before the step, plus `scale` times the step."""

    scale: float
    score: float


@dataclass(frozen=True)
class StepLength:
    """What a search for the length of a step tried and found.

    Attributes:
        standing: Score of the weights before the step.
        trials: Every multiple scored, in the order tried.
        best: The best of them; its scale is 0 when none beat standing still.
        is_bracketed: Whether a longer step was seen to be worse than the best one.
    """

    standing: float
    trials: tuple[ScaledStep, ...]
    best: ScaledStep
    is_bracketed: bool


def find_step_length(evaluate: Callable[[float], float]) -> StepLength:
    """Find the multiple of a step with the best score, by decades first and then by parabolas.

    The step as it is (1) is scored, then longer ones, ten times each, until one is worse; when already the step as it
    is is no better than standing still, shorter ones until one is better. Then successive parabolic interpolation in
    the bracket. Near a minimum of a smooth function that takes five to seven scores from a step 1,000 times too short
    or 100 times too long. One maximum along the line is assumed; of several it finds one that beats standing still.

    A score that is NaN or infinite is worse than all others; the parabola takes it to lie as far below standing still
    as the best one lies above.

    Args:
        evaluate: Returns the score (higher is better) at a multiple of the step; called with 0 first.
    """
    standing = evaluate(0.0)
    trials: list[ScaledStep] = []
    if not math.isfinite(standing):
        return StepLength(standing, (), ScaledStep(0.0, standing), is_bracketed=False)

    def at(scale: float) -> ScaledStep:
        score = evaluate(scale)
        trials.append(ScaledStep(scale, score if math.isfinite(score) else -math.inf))
        return trials[-1]

    below, best, above = _walk_by_decades(ScaledStep(0.0, standing), at)
    if best.scale > 0 and above is not None:
        for _ in range(MAX_REFINEMENTS):
            scale = _vertex(below, best, above, failed=2 * standing - best.score)
            if max(scale / best.scale, best.scale / scale) < CLOSE_ENOUGH:
                if above.scale < WIDE * best.scale:
                    break
                scale = math.sqrt(best.scale * above.scale)  # a cliff far above says little about what lies before it
            point = at(scale)
            nearer, farther = (point, best) if point.score > best.score else (best, point)
            below, above = (farther, above) if farther.scale < nearer.scale else (below, farther)
            best = nearer
    return StepLength(standing, tuple(trials), best, is_bracketed=above is not None)


def _walk_by_decades(
    still: ScaledStep, at: Callable[[float], ScaledStep]
) -> tuple[ScaledStep, ScaledStep, ScaledStep | None]:
    """Neighbours (below, best, above) with the best in the middle; `above` is None when no end was in sight."""
    above: ScaledStep | None = None
    point = at(1.0)
    while point.score <= still.score:
        if point.scale < GROWTH ** (0.5 - MAX_DECADES):
            return still, still, above
        above, point = point, at(point.scale / GROWTH)
    below, best = still, point
    while above is None and best.scale < GROWTH ** (MAX_DECADES - 0.5):
        point = at(best.scale * GROWTH)
        if point.score <= best.score:
            above = point
        else:
            below, best = best, point
    return below, best, above


def _vertex(below: ScaledStep, best: ScaledStep, above: ScaledStep, *, failed: float) -> float:
    """Where the parabola through three points, the best in the middle, has its maximum: always between the outer two.

    Args:
        below: The shorter step, or standing still.
        best: Scores more than `below` and no less than `above`.
        above: The longer step.
        failed: What a score that is not finite counts as.
    """
    left, right = best.scale - below.scale, above.scale - best.scale
    scores = (point.score if math.isfinite(point.score) else failed for point in (below, above))
    left_drop, right_drop = (best.score - score for score in scores)
    bend = left * right_drop + right * left_drop
    shift = 0.5 * (right**2 * left_drop - left**2 * right_drop) / bend if bend > 0 else 0.0
    return best.scale + shift if math.isfinite(shift) else best.scale  # not where scores are too large for the formula
