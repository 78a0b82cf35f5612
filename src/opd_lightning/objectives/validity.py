"""Which settings of an objective make sense together; the others are refused with the reason and a way out."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

from opd_lightning.objectives.candidate_weights import Weighting, WeightScale
from opd_lightning.objectives.divergences import Divergence
from opd_lightning.objectives.supports import Normalization, Support

if TYPE_CHECKING:
    from opd_lightning.objectives.objective import Objective

Estimator = Literal["direct", "score_function"]
Importance = Literal["truncated", "masked", "ppo", "none"]

VOCABULARIES: dict[str, Any] = {
    "support": Support,
    "normalization": Normalization,
    "estimator": Estimator,
    "weighting": Weighting,
    "weight_scale": WeightScale,
    "importance": Importance,
}
AT_MOST_K_SUPPORTS: tuple[Support, ...] = ("student_top_k", "teacher_top_k", "intersection")
DEFAULT_K = 16
DEFAULT_IMPORTANCE_CAP = 5.0
DEFAULT_CLIP = 0.2


def check_objective(objective: Objective) -> None:
    """Refuse impossible settings and warn about those without effect.

    Args:
        objective: With all its attributes set.

    Raises:
        ValueError: A setting is outside its range, or settings contradict each other.
    """
    for name, vocabulary in VOCABULARIES.items():
        value, allowed = getattr(objective, name), get_args(vocabulary)
        if value is not None and value not in allowed:
            raise ValueError(f"objective.{name}: expected one of {', '.join(allowed)}, got {value!r}.")
    if not isinstance(objective.divergence, Divergence):
        raise ValueError(
            f"objective.divergence: expected a Divergence such as ReverseKL(), got {objective.divergence!r}."
        )
    _check_numbers(objective)
    if objective.support == "sampled_token":
        _check_sampled_token(objective)
    elif objective.support == "full_vocabulary":
        _check_full_vocabulary(objective)
    else:
        _check_top_k(objective)
    if objective.estimator == "direct":
        _check_direct(objective)
    elif objective.support != "sampled_token" and objective.importance in ("truncated", "masked", "ppo"):
        raise ValueError(
            f"objective.importance: with support='{objective.support}' the expectation over tokens is taken "
            "analytically under the current student, so there is no sampled token whose ratio "
            f"'{objective.importance}' could use. Remove it, or use support='sampled_token'."
        )
    _warn_about_ignored(objective)


def _check_numbers(objective: Objective) -> None:
    at_least_one = "an integer of at least 1"
    temperature = "a finite number above 0 (1 leaves the model as it is)"
    cap = "a finite number of at least 1 (a smaller cap would shrink on-policy gradients)"
    clip = objective.advantage_clip
    ranges = {
        "k": (objective.k >= 1, at_least_one),
        "chunk_tokens": (objective.chunk_tokens >= 1, at_least_one),
        "student_temperature": (0 < objective.student_temperature < math.inf, temperature),
        "teacher_temperature": (0 < objective.teacher_temperature < math.inf, temperature),
        "importance_cap": (1 <= objective.importance_cap < math.inf, cap),
        "clip_low": (0 < objective.clip_low < 1, "a number between 0 and 1"),
        "clip_high": (0 < objective.clip_high < math.inf, "a finite number above 0"),
        "advantage_clip": (clip is None or clip > 0, "a number above 0, or null for no clipping"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise ValueError(f"objective.{name}: expected {wanted}, got {getattr(objective, name)}.")
    if objective.importance == "masked" and objective.importance_cap == 1:
        raise ValueError("objective.importance_cap: importance='masked' wants more than 1: at 1 nothing is left.")


def _check_sampled_token(objective: Objective) -> None:
    normalization = objective.normalization
    if objective.estimator == "direct" and normalization != "tail":
        raise ValueError(
            f"objective.estimator: 'direct' with support='sampled_token' and normalization='{normalization}' has no "
            "usable gradient: a single renormalised token has probability 1 under both models, and an un-normalised "
            "one is pushed away even where both agree. Use estimator='score_function', or normalization='tail'."
        )
    if objective.estimator == "score_function" and normalization != "none":
        raise ValueError(
            "objective.normalization: the score function of the sampled token needs its probability in the whole "
            f"vocabulary, so 'none'; got '{normalization}'. With 'tail' use estimator='direct'."
        )
    for name in ("weighting", "weight_scale", "centered"):
        if getattr(objective, name):
            raise ValueError(
                f"objective.{name}: support='sampled_token' compares one token, which the sampling already weights by "
                "the student's probability and whose mean advantage is its own. Remove it, or use a top-k support."
            )


def _check_full_vocabulary(objective: Objective) -> None:
    if objective.normalization == "tail":
        raise ValueError(
            "objective.normalization: 'tail' adds a bucket for the tokens outside the support, but 'full_vocabulary' "
            "leaves none outside. Use 'none', or a top-k support."
        )


def _check_top_k(objective: Objective) -> None:
    support, normalization = objective.support, objective.normalization
    single = objective.k == 1 and support in AT_MOST_K_SUPPORTS
    if single and normalization == "renormalize":
        raise ValueError(
            f"objective.k: a single renormalised token has probability 1 under both models, so '{support}' with k=1 "
            "and normalization='renormalize' has no gradient. Use k of at least 2, or normalization='tail'."
        )
    if single and normalization == "none" and objective.centered:
        raise ValueError(
            f"objective.centered: '{support}' with k=1 compares one token, whose centred advantage is always 0. Use "
            "k of at least 2, normalization='tail', or centered=false."
        )
    if normalization == "none" and objective.estimator == "direct":
        raise ValueError(
            f"objective.normalization: differentiating the un-normalised divergence on '{support}' moves the student "
            "even where it equals the teacher (arXiv 2605.11182). Use 'renormalize' or 'tail', or "
            "estimator='score_function'."
        )


def _check_direct(objective: Objective) -> None:
    for name in ("weighting", "weight_scale", "centered", "importance", "advantage_clip"):
        value = getattr(objective, name)
        if value and value != "none":
            raise ValueError(
                f"objective.{name}: {value!r} belongs to estimator='score_function'; estimator='direct' differentiates "
                "the divergence itself and would ignore it. Remove it, or set estimator='score_function'."
            )


def _warn_about_ignored(objective: Objective) -> None:
    has_lists = objective.support not in ("sampled_token", "full_vocabulary")
    importance = objective.effective_importance
    ignored = {
        "k": (objective.k != DEFAULT_K and not has_lists, "a top-k support"),
        "importance_cap": (
            objective.importance_cap != DEFAULT_IMPORTANCE_CAP and importance not in ("truncated", "masked"),
            "importance='truncated' or 'masked'",
        ),
        "clip_low": (objective.clip_low != DEFAULT_CLIP and importance != "ppo", "importance='ppo'"),
        "clip_high": (objective.clip_high != DEFAULT_CLIP and importance != "ppo", "importance='ppo'"),
    }
    for name, (is_ignored, partner) in ignored.items():
        if is_ignored:
            warnings.warn(
                f"objective.{name}={getattr(objective, name)} is ignored: it only matters with {partner}.", stacklevel=4
            )
