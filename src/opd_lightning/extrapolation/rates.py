"""Learning rates of an optimiser and its schedulers, multiplied as a whole."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr")


def scale_rates(optimizer: Optimizer, schedulers: Iterable[Any], factor: float) -> None:
    """Multiply the rate of every parameter group, and all that the schedulers will make of it, by one factor.

    Afterwards optimiser and schedulers are where they would be had they been built with rates so much larger: floors,
    peaks and base rates move along, and groups keep their proportions. Knows every scheduler of torch; one of your own
    is followed when it computes from `base_lrs` or from the groups' rates.

    Args:
        optimizer: Whose groups are scaled.
        schedulers: Those of this optimiser.
        factor: Positive.
    """
    for group in optimizer.param_groups:
        _scale(group, _GROUP_RATES, factor)
    for scheduler in _flat(schedulers):
        _scale(vars(scheduler), _SCHEDULER_RATES, factor)


def peak_rate(optimizer: Optimizer, schedulers: Iterable[Any], number: int = 0) -> float:
    """The largest rate of a parameter group that its schedule is known to reach (the end of a warm-up, say)."""
    group = optimizer.param_groups[number]
    peaks = [float(group[name]) for name in ("lr", "initial_lr", "max_lr") if name in group]
    peaks += [float(scheduler.max_lrs[number]) for scheduler in _flat(schedulers) if hasattr(scheduler, "max_lrs")]
    return max(peaks)


def _flat(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and, in front of each, those that it is made of."""
    flat: list[Any] = []
    for scheduler in schedulers:
        flat += [*_flat(getattr(scheduler, "_schedulers", ())), scheduler]
    return flat


def _scale(holder: MutableMapping[str, Any], names: Sequence[str], factor: float) -> None:
    for name in names:
        if name not in holder:
            continue
        rates = holder[name]
        if isinstance(rates, list | tuple):
            holder[name] = type(rates)(rate * factor for rate in rates)
        elif isinstance(rates, Tensor) and name == "lr":
            rates.mul_(factor)  # compiled and captured optimisers hold on to this very tensor
        elif rates is not None:
            holder[name] = rates * factor
