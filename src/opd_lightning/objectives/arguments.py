"""Checks that objectives share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from opd_lightning.interfaces import Sampling


def check_temperatures(**temperatures: float) -> None:
    """Refuse temperatures that are none.

    Raises:
        ValueError: One of them is.
    """
    for name, value in temperatures.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"objective.{name}: expected a finite number above 0 (1 leaves the model as it is), got {value}."
            )


def check_factor(name: str, value: object, kind: type) -> None:
    """Refuse what is not a factor of its kind, such as a name where an object is expected.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, kind):
        raise ValueError(
            f"objective.{name}: expected an instance of a subclass of {kind.__name__}, got {value!r}. In YAML name the"
            " class, in Python construct it."
        )


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse words that are not among those allowed.

    Raises:
        ValueError: It is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.")


def check_advantage_clip(owner: str, clip: float | None) -> None:
    """Refuse a bound on rewards that is none.

    Raises:
        ValueError: It is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"{owner}.advantage_clip: expected a number above 0, or null for no clipping, got {clip}.")


def check_whole_distribution(sampling: Sampling, student_temperature: float, allow_biased_sampling: bool) -> None:
    """Make sure that rollouts come from the distribution that the losses take expectations under.

    Another temperature, or a top-p or top-k cut, visits other states and weights tokens differently, so the gradient is
    no longer that of the stated divergence.

    Args:
        sampling: How training rollouts will be drawn.
        student_temperature: What divides the student's logits in the loss.
        allow_biased_sampling: Accept it, and warn.

    Raises:
        ValueError: They differ and that is not accepted.
    """
    reasons = []
    if sampling.temperature == 0:
        reasons.append(
            "sampling.temperature is 0, which draws the likeliest token always, and one above 0 is needed; set it to"
            f" objective.student_temperature, {student_temperature}"
        )
    elif sampling.temperature != student_temperature:
        reasons.append(
            f"sampling.temperature is {sampling.temperature} but objective.student_temperature is "
            f"{student_temperature}; set both to the same value"
        )
    if sampling.top_p < 1 or sampling.top_k > 0:
        reasons.append(
            f"sampling.top_p={sampling.top_p} and sampling.top_k={sampling.top_k} cut tokens off; set top_p to 1 "
            "and top_k to 0"
        )
    if not reasons:
        return
    message = f"The rollouts would not follow the student's distribution: {'; '.join(reasons)}."
    if not allow_biased_sampling:
        raise ValueError(f"{message} Or accept the bias with objective.allow_biased_sampling=true.")
    warnings.warn(f"{message} Accepted because objective.allow_biased_sampling is true.", stacklevel=3)
