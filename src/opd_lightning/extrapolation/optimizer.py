"""EffOPD around any torch optimiser, for training loops without Lightning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from opd_lightning.extrapolation import (
    DEFAULT_LORA_STEP,
    Accept,
    Extrapolator,
    LineSearch,
    LoraStep,
    ParameterFilter,
    Schedule,
    ScheduleSpec,
    SearchReport,
    any_sharded,
    check_device,
    reshard,
    select_parameters,
    undisturbed,
)

_STATE_KEY = "effopd"
_log = logging.getLogger(__name__)


class EffOPDOptimizer(Optimizer):
    """An optimiser that, after some of its steps, moves the weights on along their recent update direction.

    `step()` runs the wrapped optimiser and then, when a search is due, the one that `EffOPD` describes
    (arXiv 2605.11739, section 4.1). Everything else is the wrapped optimiser's: parameter groups, state, defaults,
    hooks; so learning-rate schedulers, `GradScaler` and closures work with either object. `state_dict` is the wrapped
    one's with an entry "effopd" that holds the older point and the counters.

    W_0 is taken at the first `step()`, before the wrapped optimiser moves anything. Each score is taken without
    gradients and from a random state that depends on the step only, which is restored afterwards; with `module` given,
    also in eval mode. In a `torch.distributed` program every process calls `step()`, and all take the mean score.

    Limits: a state saved through `torch.distributed.checkpoint`'s optimiser helpers loses the entry "effopd". A fused
    optimiser's own handling of `GradScaler` is switched off: the scaler unscales and skips instead. LBFGS works (call
    `step(closure)`), but does not know of the moves: the pair of points it remembers across one is wrong.

    Args:
        optimizer: The optimiser to wrap; its parameters are those that may move.
        score: What to maximise: a function without arguments that returns a number for the weights as they are. When
            it has an attribute `tokens` (spent so far on this process), searches report what they cost in tokens.
        schedule: "powers_of_two", "adaptive", an integer n (every n steps), or a list of steps.
        candidates: Positive multiples of Delta to add to the current weights, in increasing order.
        backward: Negative multiples, tried only when the first candidate fails.
        accept: "not_worse" keeps ties with the best so far (the paper), "better" does not (the authors' code). When
            all scores of a search tie, nothing moves.
        parameters: Which weights move: a regular expression searched in their names, or a predicate on names. Names
            come from `module`, else from the optimiser if it was built with `named_parameters()`, else they are
            "<group>.<index>".
        anchor_device: Where the older point lives; None puts it beside the weights, "cpu" saves device memory.
        min_improvement: Amount by which a candidate must beat the best so far, in units of the score.
        lora: How LoRA pairs move: "factors" moves A and B one by one, "product" takes the exact step of B A (cut back
            to rank r).
        module: The model, for names, eval mode during scoring, and FSDP2 (where it is required).

    Attributes:
        optimizer: The wrapped optimiser.
        last_search: Report of the latest search, None before the first.

    Raises:
        ValueError: An argument is outside its range; at the first step also when no weight is chosen.
    """

    _step_supports_amp_scaling = (
        False  # else GradScaler would leave its scale on this object, unseen by the wrapped one
    )

    def __init__(
        self,
        optimizer: Optimizer,
        score: Callable[[], float],
        schedule: ScheduleSpec = Schedule.spec,
        candidates: Sequence[float] = LineSearch.candidates,
        backward: Sequence[float] = LineSearch.backward,
        accept: Accept = LineSearch.accept,
        parameters: ParameterFilter = None,
        anchor_device: str | None = None,
        min_improvement: float = LineSearch.min_improvement,
        lora: LoraStep = DEFAULT_LORA_STEP,
        module: nn.Module | None = None,
    ) -> None:
        # Optimizer.__init__ is left out on purpose: groups, state and hooks belong to the wrapped optimiser.
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}.")
        if not callable(score):
            raise ValueError(f"score: expected a function without arguments, got {score!r}.")
        check_device(anchor_device)
        if schedule == "rounds":
            raise ValueError(
                "schedule: an optimiser does not know when a round ends; 'rounds' is for the EffOPD callback."
            )
        self.optimizer = optimizer
        self.score = score
        self.parameters = parameters
        self.module = module
        self.last_search: SearchReport | None = None
        self._extrapolator = Extrapolator(
            LineSearch(candidates, backward, accept, min_improvement),
            Schedule(schedule),
            anchor_device=anchor_device,
            lora=lora,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimiser's parameter groups, themselves."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimiser's state, itself."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimiser's defaults, themselves."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the wrapped optimiser, then search when it is due.

        Args:
            closure: Passed on to the wrapped optimiser.

        Returns:
            What the wrapped optimiser returned.
        """
        if not self._extrapolator.started:
            self._start()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._extrapolator.count_step()
        if self._extrapolator.is_due:
            report = self._extrapolator.search(
                self._evaluate,
                before_edit=self._reshard,
                count_tokens=lambda: getattr(self.score, "tokens", 0),
            )
            if report is not None:
                self.last_search = report
                _log.info("%s", report)
        return loss

    def _evaluate(self) -> float:
        with undisturbed(self.module, seed=self._extrapolator.num_steps):
            return self.score()

    def _start(self) -> None:
        weights = self._select()
        if self.module is None and any_sharded(weights.values()):
            raise ValueError("module: expected the model, because its weights are sharded (FSDP2), got None.")
        self._extrapolator.start(weights)

    def _select(self) -> dict[str, Tensor]:
        self._reshard()
        return select_parameters(self._named_parameters(), self.parameters)

    def _reshard(self) -> None:
        if self.module is not None:
            reshard(self.module)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        known = {} if self.module is None else {id(weight): name for name, weight in self.module.named_parameters()}
        for number, group in enumerate(self.param_groups):
            for index, weight in enumerate(group["params"]):
                own = group["param_names"][index] if "param_names" in group else f"{number}.{index}"
                yield known.get(id(weight), own), weight

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the wrapped optimiser's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimiser; the older point of its weights is where they are now."""
        self.optimizer.add_param_group(param_group)
        if self._extrapolator.started:
            self._extrapolator.replace(self._select())

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimiser's state and, under "effopd", the older point and the counters."""
        return {**self.optimizer.state_dict(), _STATE_KEY: self._extrapolator.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore `state_dict`; from a state saved without EffOPD the count starts at the next step."""
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != _STATE_KEY})
        self._extrapolator.reset()
        if _STATE_KEY in state_dict:
            self._extrapolator.load_state_dict(deepcopy(state_dict[_STATE_KEY]))
        else:
            warnings.warn(
                "EffOPD: the optimiser state was saved without EffOPD; it starts counting at the next step.",
                stacklevel=2,
            )

    def summary(self) -> str:
        """Totals of the run in one line: searches, how many moved the weights, share of the time."""
        return self._extrapolator.summary()
