"""A learning rate found in the run: the line search as a state machine around an optimiser's first steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from opd_lightning.distributed import agree, gather_objects
from opd_lightning.extrapolation.isolation import undisturbed
from opd_lightning.extrapolation.rates import peak_rate, scale_rates
from opd_lightning.extrapolation.shards import reshard
from opd_lightning.extrapolation.step_length import StepLength, find_step_length
from opd_lightning.extrapolation.weights import AnchoredWeights

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RateReport:
    """What one search for the learning rate did.

    Attributes:
        step: Optimiser steps counted when it ran.
        found: Scores of the multiples of that step.
        old_rate: The rate before (with a warm-up: the one that it leads to) of the first parameter group that has any.
        new_rate: The same rate now.
        is_final: Whether no further search will follow.
        seconds: Wall-clock time.
        tokens: Tokens that the score spent over all processes, as far as it counts them.
    """

    step: int
    found: StepLength
    old_rate: float
    new_rate: float
    is_final: bool
    seconds: float
    tokens: int

    @property
    def accepted(self) -> bool:
        """Whether a length was found that is better than standing still."""
        return self.found.best.scale > 0

    def metrics(self, prefix: str = "learning_rate_search") -> dict[str, float]:
        """Numbers for a logger."""
        numbers = {
            "learning_rate": self.new_rate,
            "factor": self.new_rate / self.old_rate,
            "scale": self.found.best.scale,
            "num_scores": float(1 + len(self.found.trials)),
            "score_before_step": self.found.standing,
            "score_after": self.found.best.score,
            "seconds": self.seconds,
            "tokens": float(self.tokens),
        }
        numbers |= {f"score_at/{trial.scale:g}": trial.score for trial in self.found.trials}
        return {f"{prefix}/{name}": number for name, number in numbers.items()}

    def outcome(self) -> str:
        """What became of it, in less than a line of 80 columns."""
        if not self.accepted:
            return f"Line search step {self.step}: learning rate stays {self.old_rate:.3g}"
        scores = f"score {self.found.standing:.4g} -> {self.found.best.score:.4g}"
        return f"Line search step {self.step}: learning rate {self.old_rate:.3g} -> {self.new_rate:.3g}, {scores}"

    def __str__(self) -> str:
        tried = ", ".join(f"x{trial.scale:.3g}: {trial.score:.5g}" for trial in self.found.trials) or "none"
        if self.accepted:
            verdict = f"learning rate {self.old_rate:.3g} -> {self.new_rate:.3g}"
        else:
            verdict = f"learning rate stays {self.old_rate:.3g}, no length of this step beats standing still"
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        again = "" if self.is_final else "; will look again"
        return (
            f"Line search after step {self.step}: {verdict} (score {self.found.standing:.5g} before the step; "
            f"tried lengths {tried}; {self.seconds:.2f} s{tokens}){again}"
        )


class RateSearch:
    """Finds the learning rate from the length that an optimiser's first step should have had.

    The step of SGD, Adam and most others is proportional to the rate. So one line search along the first step
    (`find_step_length`) shows what the rate should be, and the weights before the step, plus the step at its best
    length, are where a run with that rate would be: the run goes on as if it had been started with it (up to rounding;
    nothing else that the optimiser remembers of its first step depends on the rate). Then it is over and costs nothing.

    When no length beats standing still, or when even the longest step tried was better still, the search is repeated
    after steps 2, 4, 8, ..., each time along one step.

    The best length becomes the *peak* of the schedule: in a warm-up the weights get the share that the schedule gives
    to this step.

    Args:
        optimizer: Whose rates are found; all its trainable parameters move, and all its groups are scaled alike.

    Attributes:
        last_search: Report of the latest search, None before the first.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.num_steps = 0
        self.is_final = False
        self.last_search: RateReport | None = None
        self._weights: AnchoredWeights | None = None
        self._group = 0  # whose rate is told: the first that moves, since all are scaled alike
        self._step_rate = math.nan
        self._num_before = 0  # steps made when these weights were kept

    @property
    def will_search(self) -> bool:
        """Whether the step that comes next is to be searched."""
        return not self.is_final and self._weights is None and self.num_steps & (self.num_steps + 1) == 0

    def before_step(self) -> None:
        """Keep the weights before a step that is about to be made, when it is to be searched."""
        if self.will_search:
            self._weights = AnchoredWeights(self._trainable())
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            self._group = next((number for number, rate in enumerate(rates) if rate > 0), 0)
            self._step_rate = rates[self._group]
            self._num_before = self.num_steps

    def count_step(self) -> None:
        """Note that a step has been made."""
        self.num_steps += 1

    @property
    def is_due(self) -> bool:
        """Whether a step has been made that is to be searched."""
        return self._weights is not None and self.num_steps > self._num_before

    def search(
        self,
        score: Callable[[], float],
        schedulers: Iterable[Any] = (),
        *,
        before_edit: Callable[[], None] = lambda: None,
        after_edit: Callable[[], None] = lambda: None,
        count_tokens: Callable[[], int] = lambda: 0,
    ) -> RateReport | None:
        """Search along the step just made, move the weights to its best length and scale the rates.

        When no length is better than none, weights and rates stay as they are, bit for bit; so they do when the score
        raises.

        Args:
            score: Score of the weights as they are when it is called, higher is better; processes that train together
                all call it and take the mean.
            schedulers: Those of the optimiser; their curves are scaled as a whole.
            before_edit: Called before weights are read or written.
            after_edit: Called each time weights were written.
            count_tokens: Tokens that `score` has spent so far on this process.

        Returns:
            What happened, or None when the step changed no weight (the rate of a warm-up may begin at 0).
        """
        assert self._weights is not None, "no step to search"
        weights, self._weights = self._weights, None
        clock, tokens, schedulers = time.perf_counter(), count_tokens(), list(schedulers)
        before_edit()
        length = agree(weights.measure()[0])
        if not (math.isfinite(length) and length > 0 and self._step_rate > 0):
            return None

        def move_to(scale: float) -> None:
            before_edit()
            weights.move_to(scale - 1.0)
            after_edit()

        def evaluate(scale: float) -> float:
            move_to(scale)
            return agree(float(score()))

        weights.begin()
        old_rate = peak_rate(self.optimizer, schedulers, self._group)
        try:
            found = find_step_length(evaluate)
            factor = found.best.scale * self._step_rate / old_rate if found.best.scale > 0 else 1.0
            move_to(factor)
        except BaseException:
            move_to(1.0)
            raise
        if factor != 1.0:
            scale_rates(self.optimizer, schedulers, factor)
        self.is_final = found.best.scale > 0 and found.is_bracketed
        self.last_search = RateReport(
            step=self.num_steps,
            found=found,
            old_rate=old_rate,
            new_rate=old_rate * factor,
            is_final=self.is_final,
            seconds=time.perf_counter() - clock,
            tokens=sum(gather_objects(count_tokens() - tokens)),
        )
        return self.last_search

    def attach(
        self, score: Callable[[], float], schedulers: Iterable[Any] = (), module: nn.Module | None = None
    ) -> None:
        """Search by itself inside `optimizer.step()`, in a training loop without Lightning.

        With `EffOPDOptimizer` make this object for the optimiser that it wraps (its attribute `optimizer`): then the
        length of the first step is found before EffOPD looks at it.

        Args:
            score: See `search`. Taken without gradients and from a random state that depends on the step only.
            schedulers: See `search`.
            module: The model, put into eval mode while it is scored; needed with FSDP2.
        """

        def free() -> None:
            if module is not None:
                reshard(module)

        def before(*_: Any) -> None:
            free()
            self.before_step()

        def after(*_: Any) -> None:
            self.count_step()

            def evaluate() -> float:
                with undisturbed(module, seed=self.num_steps):
                    return score()

            if self.is_due and (report := self.search(evaluate, schedulers, before_edit=free)) is not None:
                _log.info("%s", report)

        self.optimizer.register_step_pre_hook(before)
        self.optimizer.register_step_post_hook(after)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; found rates are in the states of optimiser and schedulers."""
        return {"num_steps": self.num_steps, "is_final": self.is_final}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.num_steps, self.is_final = state["num_steps"], state["is_final"]

    def _trainable(self) -> dict[str, Tensor]:
        groups = enumerate(self.optimizer.param_groups)
        named = ((f"{i}.{j}", weight) for i, group in groups for j, weight in enumerate(group["params"]))
        return {name: weight for name, weight in named if weight.requires_grad}
