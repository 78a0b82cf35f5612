"""EffOPD as a Lightning callback: the search of `extrapolation` at the right moment of any fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.callbacks.weight_search import WeightSearch
from opd_lightning.distributed import gather_objects
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
    check_device,
    reshard,
    select_parameters,
)
from opd_lightning.interfaces import Score


class EffOPD(WeightSearch):
    """Move the weights along their recent update direction while a score does not get worse (arXiv 2605.11739, 4.1).

    After optimiser steps 1, 2, 4, 8, ... (or another schedule) Delta is the change of the weights since the search
    before. Points `W + factor * Delta` are scored in order and the last one that was accepted becomes the weights;
    when the first fails nothing changes, bit for bit. Optimiser state and learning rate are left alone.

    The search runs in `on_train_batch_end`, after the optimiser step and before `ModelCheckpoint` saves. Each score
    is taken in eval mode, without gradients, in the trainer's precision and from a random state that depends on the
    step only; modes and random state are restored. Processes take the mean of their scores, so all decide alike. The
    older point and all counters are in the checkpoint: a resumed run equals an uninterrupted one. When the module
    defines `on_weights_moved()`, it is called each time weights were written, tried candidates included; when it
    defines `on_searched(factor)`, after each search, with the factor kept (0: nothing moved).

    Works with automatic and manual optimisation, gradient accumulation, mixed precision, DDP and FSDP2
    (`ModelParallelStrategy`). Limits: buffers (running statistics, say) are not moved; weights that become trainable
    after the start of fit are not moved; FSDP1 and DeepSpeed are refused, because they keep flat or master copies of
    the weights that an edit would not reach.

    Args:
        score: What to maximise: a `Score`, or a function of the module that returns a number. When it has an attribute
            `tokens` (spent so far on this process), searches report what they cost in tokens.
        schedule: "powers_of_two", "adaptive", an integer n (every n optimiser steps), or a list of steps; counted since
            the callback started, in steps of the chosen optimiser. "rounds" searches when `training_step` returns
            ``{"ends_round": True}``, as `OPDModule` does in the last step on rollouts of one generation.
        candidates: Positive multiples of Delta to add to the current weights, in increasing order.
        backward: Negative multiples, tried only when the first candidate fails: averaging with the older point.
        accept: "not_worse" keeps ties with the best so far (the paper), "better" does not (the authors' code). When
            all scores of a search tie, nothing moves.
        parameters: Which weights move: a regular expression searched in their names, or a predicate on names; None
            moves all that are trainable when fit starts.
        anchor_device: Where the older point lives; None puts it beside the weights, "cpu" saves device memory.
        min_improvement: Amount by which a candidate must beat the best so far, in units of the score.
        lora: How LoRA pairs move: "factors" moves A and B one by one, "product" takes the exact step of B A (cut back
            to rank r).
        optimizer_index: Which of several optimisers' steps are counted.
        name: Tells several of these callbacks apart in checkpoints and logs ("effopd/<name>"); one needs none.

    Attributes:
        last_search: Report of the latest search, None before the first.

    Raises:
        ValueError: An argument is outside its range; at the start of fit also when no weight is chosen, the strategy
            is not supported, there is no such optimiser or device, the score cannot be taken, or another of these
            callbacks has the same name.
    """

    tells_searches = True  # says to settings that wait for searches that the module hears of them (`on_searched`)

    def __init__(
        self,
        score: Score | Callable[[LightningModule], float],
        schedule: ScheduleSpec = Schedule.spec,
        candidates: Sequence[float] = LineSearch.candidates,
        backward: Sequence[float] = LineSearch.backward,
        accept: Accept = LineSearch.accept,
        parameters: ParameterFilter = None,
        anchor_device: str | None = None,
        min_improvement: float = LineSearch.min_improvement,
        lora: LoraStep = DEFAULT_LORA_STEP,
        optimizer_index: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(score, optimizer_index)
        if name is not None and (not name or "/" in name):
            raise ValueError(f"name: expected a word without slashes, or null, got {name!r}.")
        self.name = name
        self._key = "effopd" if name is None else f"effopd/{name}"
        self._anchor_device = anchor_device
        self.parameters = parameters
        self._extrapolator = Extrapolator(
            LineSearch(candidates, backward, accept, min_improvement),
            Schedule(schedule),
            anchor_device=anchor_device,
            lora=lora,
        )
        self._restored = False
        self._fitted: weakref.ref[LightningModule] | None = None
        self.last_search: SearchReport | None = None

    @property
    def has_pending_search(self) -> bool:
        """Whether optimiser steps call for a search that has not been finished."""
        return self._extrapolator.is_due

    @override
    def check_setup(self, callbacks: list[Callback]) -> None:
        """Refuse absent devices, and twins."""
        check_device(self._anchor_device)
        if sum(isinstance(other, EffOPD) and other.name == self.name for other in callbacks) > 1:
            shared = "no name" if self.name is None else f"the name {self.name!r}"
            raise ValueError(
                f"callbacks: several EffOPD callbacks have {shared}, so that checkpoints and logs could not tell them "
                "apart. Give each a name of its own (EffOPD.name)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the older point: from the checkpoint, from the last fit of the same run, or where the weights are."""
        reshard(pl_module)
        weights = select_parameters(pl_module.named_parameters(), self.parameters)
        is_continued = self._fitted is not None and self._fitted() is pl_module and trainer.global_step > 0
        if self._restored:
            self._extrapolator.start(weights)
        elif is_continued:
            self._extrapolator.replace(weights)
        else:
            self._extrapolator.reset()
            self._extrapolator.start(weights)
        self._restored, self._fitted = False, weakref.ref(pl_module)
        optimizer = self.find_optimizer(trainer)
        self._hooks = [optimizer.register_step_post_hook(lambda *_: self._extrapolator.count_step())]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Search when optimiser steps since the last look call for it; micro-batches in between do not."""
        if self._extrapolator.schedule.spec == "rounds" and _ends_round(outputs):
            self._extrapolator.ask()
        if not self._extrapolator.is_due:
            return
        self.begin_scores(trainer, pl_module)
        report = self._extrapolator.search(
            lambda: self.take_score(trainer, pl_module, seed=self._extrapolator.num_steps),
            **self.around_search(pl_module),
        )
        if report is None:
            return
        self.last_search = report
        getattr(pl_module, "on_searched", lambda factor: None)(report.best.factor)
        say(trainer, self._signed(str(report)))
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(self._key), step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting and say what the searches of the run amounted to."""
        super().on_train_end(trainer, pl_module)
        self._extrapolator.pause()
        say(trainer, self._signed(self._extrapolator.summary()))
        for logger in trainer.loggers:
            logger.log_metrics(self._extrapolator.totals(self._key), step=trainer.global_step)

    def _signed(self, line: str) -> str:
        return line if self.name is None else f"{self.name}: {line}"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the older point and the counters into the checkpoint (tensors, numbers and containers only)."""
        if self._extrapolator.started:
            keeps_shards = getattr(trainer.strategy, "keeps_shards", False)  # Lightning's own writes rank 0's alone
            state = checkpoint[self._key] = self._extrapolator.state_dict(gathered=not keeps_shards)
            if keeps_shards:  # all but the shards is taken from the first process, and each has sampled its own
                state["directions"] = [mine for part in gather_objects(state["directions"]) for mine in part]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the older point and the counters from the checkpoint when training resumes from it."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._extrapolator.reset()
        self._fitted = None
        self._restored = self._key in checkpoint
        if self._restored:
            self._extrapolator.load_state_dict(checkpoint[self._key])
        else:
            without = "EffOPD" if self.name is None else f"an EffOPD named {self.name!r}"
            rank_zero_warn(
                f"EffOPD: the checkpoint was saved without {without}; it starts counting here, from the loaded weights."
            )


def _ends_round(outputs: Any) -> bool:
    """Whether a training step says that the rollouts it was given will not be used again.

    Raises:
        ValueError: It does not say.
    """
    if not (isinstance(outputs, Mapping) and "ends_round" in outputs):
        raise ValueError(
            "schedule: 'rounds' needs a training_step that returns {'ends_round': true or false, ...}, as that of"
            " OPDModule does; this one's says nothing of it. Return it, or choose another schedule."
        )
    return bool(outputs["ends_round"])
