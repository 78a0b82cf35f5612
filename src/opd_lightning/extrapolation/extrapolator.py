"""The search as a state machine: count steps, and when one is due measure, try, accept or go back."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.distributed import agree, gather_objects
from opd_lightning.extrapolation.line_search import LineSearch, SearchOutcome, all_tie
from opd_lightning.extrapolation.report import SearchReport
from opd_lightning.extrapolation.schedule import FIRST_PAUSE, Schedule, next_pause
from opd_lightning.extrapolation.weights import DEFAULT_LORA_STEP, AnchoredWeights, LoraStep


class Extrapolator:
    """Counts optimiser steps and searches along W_t - W_0 when a search is due (arXiv 2605.11739, section 4.1).

    W_0 is the point kept by the search before (the weights at `start` for the first one). Optimiser state and learning
    rate are left alone.

    Args:
        line_search: Candidates and accept rule.
        schedule: When to search.
        anchor_device: See `AnchoredWeights`.
        lora: See `AnchoredWeights`.
    """

    def __init__(
        self,
        line_search: LineSearch,
        schedule: Schedule,
        *,
        anchor_device: torch.device | str | None = None,
        lora: LoraStep = DEFAULT_LORA_STEP,
    ) -> None:
        if lora not in ("factors", "product"):
            raise ValueError(f"lora: expected 'factors' or 'product', got {lora!r}.")
        self.line_search = line_search
        self.schedule = schedule
        self._anchor_device = anchor_device
        self._lora: LoraStep = lora
        self.reset()

    def reset(self) -> None:
        """Forget the weights and everything counted."""
        self.num_steps = 0
        self.num_searches = 0
        self.num_accepted = 0
        self.num_tied = 0
        self.search_seconds = 0.0
        self._settled_step = 0
        self._pause = FIRST_PAUSE
        self._is_asked = False
        self._elapsed_before = 0.0
        self._running_since: float | None = None
        self._weights: AnchoredWeights | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def started(self) -> bool:
        """Whether there are weights to move."""
        return self._weights is not None

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Take these weights as W_0; after `load_state_dict`, go on from the loaded W_0 instead."""
        self._weights = AnchoredWeights(parameters, anchor_device=self._anchor_device, lora=self._lora)
        if self._loaded is not None:
            self._weights.load_state_dict(self._loaded)
            self._loaded = None
        self._running_since = time.perf_counter()

    def replace(self, parameters: Mapping[str, Tensor]) -> None:
        """Go on with other weight objects of the same names; new names start from where they are."""
        assert self._weights is not None
        state = self._weights.state_dict(gathered=False)
        self._weights = AnchoredWeights(parameters, anchor_device=self._anchor_device, lora=self._lora)
        self._weights.load_state_dict(state, strict=False)
        self._running_since = self._running_since or time.perf_counter()

    def pause(self) -> None:
        """Stop the clock until the next `start` or `replace`."""
        self._elapsed_before, self._running_since = self.elapsed_seconds, None

    def count_step(self) -> None:
        """Note one optimiser step."""
        self.num_steps += 1

    def ask(self) -> None:
        """Make a search due, whatever the steps counted say."""
        self._is_asked = True

    @property
    def is_due(self) -> bool:
        """Whether a search was asked for, or the steps counted since the last look call for one."""
        return self._is_asked or self.schedule.is_due(self._settled_step, self.num_steps, self._pause)

    def search(
        self,
        score: Callable[[], float],
        *,
        before_edit: Callable[[], None] = lambda: None,
        after_edit: Callable[[], None] = lambda: None,
        count_tokens: Callable[[], int] = lambda: 0,
    ) -> SearchReport | None:
        """Search once from the current weights and leave them at the point kept.

        A rejected search leaves every weight as it was, bit for bit. So does one whose score raises; that search
        stays due.

        Args:
            score: Score of the weights as they are when it is called, higher is better; processes that train together
                all call it and take the mean.
            before_edit: Called before weights are read or written.
            after_edit: Called each time weights were written.
            count_tokens: Tokens that `score` has spent so far on this process.

        Returns:
            What happened, or None when Delta is zero or not finite (then nothing is scored).
        """
        assert self._weights is not None, "start() comes first"
        clock, tokens = time.perf_counter(), count_tokens()
        before_edit()
        delta_norm, cosine = (agree(value) for value in self._weights.measure())
        if not (math.isfinite(delta_norm) and delta_norm > 0):
            self._settled_step, self._is_asked = self.num_steps, False
            if delta_norm != 0:
                warnings.warn(f"EffOPD: no search at step {self.num_steps}, the weights are not finite.", stacklevel=2)
            return None
        outcome = self._walk(self._weights, score, before_edit, after_edit)
        self._settled_step, self._is_asked = self.num_steps, False
        self._pause = next_pause(self._pause, accepted=outcome.best.factor != 0)
        seconds = time.perf_counter() - clock
        self.num_searches += 1
        self.num_accepted += outcome.best.factor != 0
        self.num_tied += all_tie(outcome.baseline, outcome.trials)
        self.search_seconds += seconds
        return SearchReport(
            step=self.num_steps,
            baseline=outcome.baseline,
            trials=outcome.trials,
            best=outcome.best,
            delta_norm=delta_norm,
            cosine=cosine,
            seconds=seconds,
            tokens=sum(gather_objects(count_tokens() - tokens)),
        )

    def _walk(
        self,
        weights: AnchoredWeights,
        score: Callable[[], float],
        before_edit: Callable[[], None],
        after_edit: Callable[[], None],
    ) -> SearchOutcome:
        def move_to(factor: float) -> None:
            before_edit()
            weights.move_to(factor)
            after_edit()

        def evaluate(factor: float) -> float:
            if factor != 0:
                move_to(factor)
            return agree(float(score()))

        weights.begin()
        try:
            outcome = self.line_search.run(evaluate)
            if outcome.trials and outcome.trials[-1] is not outcome.best:
                move_to(outcome.best.factor)
            before_edit()
            weights.end(moved=outcome.best.factor != 0)
        except BaseException:
            before_edit()
            weights.abort()
            after_edit()
            raise
        return outcome

    @property
    def elapsed_seconds(self) -> float:
        """Wall-clock time since the first `start`, pauses and interruptions of the run excluded."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._elapsed_before + running

    def summary(self) -> str:
        """Totals of the run in one line."""
        ties = f"{self.num_tied} tied, " if self.num_tied else ""
        seconds = f"{self.search_seconds:.1f} of {self.elapsed_seconds:.1f} s"
        return (
            f"EffOPD: {self.num_searches} searches, {self.num_accepted} accepted, {ties}"
            f"{100 * self._share_of_time:.1f} % of wall-clock ({seconds})"
        )

    def totals(self, prefix: str = "effopd") -> dict[str, float]:
        """Totals of the run for a logger."""
        return {
            f"{prefix}/num_searches": float(self.num_searches),
            f"{prefix}/num_accepted": float(self.num_accepted),
            f"{prefix}/num_tied": float(self.num_tied),
            f"{prefix}/share_of_wall_clock": self._share_of_time,
        }

    @property
    def _share_of_time(self) -> float:
        return self.search_seconds / max(self.elapsed_seconds, self.search_seconds, 1e-9)

    def state_dict(self, *, gathered: bool = False) -> dict[str, Any]:
        """Every value a future search reads: counters, anchor, last direction; plain numbers, containers and tensors.

        Args:
            gathered: See `AnchoredWeights.state_dict`.
        """
        weights = self._weights.state_dict(gathered=gathered) if self._weights is not None else self._loaded or {}
        return {
            "num_steps": self.num_steps,
            "settled_step": self._settled_step,
            "pause": self._pause,
            "is_asked": self._is_asked,
            "num_searches": self.num_searches,
            "num_accepted": self.num_accepted,
            "num_tied": self.num_tied,
            "search_seconds": self.search_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            **weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the anchor is taken over by the next `start`."""
        self.reset()
        self.num_steps = state["num_steps"]
        self._settled_step = state["settled_step"]
        self._pause = state.get("pause", FIRST_PAUSE)  # absent from older checkpoints
        self._is_asked = state.get("is_asked", False)  # absent from older checkpoints
        self.num_searches = state["num_searches"]
        self.num_accepted = state["num_accepted"]
        self.num_tied = state.get("num_tied", 0)  # absent from older checkpoints
        self.search_seconds = state["search_seconds"]
        self._elapsed_before = state["elapsed_seconds"]
        self._loaded = {key: state[key] for key in ("anchor", "directions")} if "anchor" in state else None
