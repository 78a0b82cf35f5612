"""A learning rate found in the run, as a Lightning callback: `extrapolation.RateSearch` in any fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.callbacks.weight_search import WeightSearch
from opd_lightning.extrapolation import RateReport, RateSearch, reshard
from opd_lightning.interfaces import Score


class LearningRateLineSearch(WeightSearch):
    """Find the learning rate from the first step's best length, so that no sweep is needed.

    After the first optimiser step a line search scores multiples of that step on a small task of your choice, by
    decades and then by parabolas, and the best one tells the rate: the weights move there, every parameter group and
    the whole curve of its schedulers are multiplied, and the run goes on as if it had been started with that rate.
    Five to seven scores, once. The rate that the optimiser was built with only has to be positive.

    What is found is the *peak* of the schedule: with a warm-up the first step keeps its small share. When no multiple
    beats standing still, nothing changes, to the bit, and the steps 2, 4, 8, ... are searched until one does.

    The search runs in `on_train_batch_end`, before `ModelCheckpoint` saves. Scores are taken as `EffOPD` takes them: in
    eval mode, without gradients, in the trainer's precision and from a random state that depends on the step only;
    processes take the mean. Its state is in the checkpoint, the rates are in those of optimiser and schedulers: a
    resumed run equals an uninterrupted one. When the module defines `on_weights_moved()`, it is called each time
    weights were written.

    Limits: the optimiser's first step has to be proportional to its rate (SGD, Adam, Adagrad, Lion, Muon; not LBFGS,
    nor one that sets its own rate). Where a batch makes several optimiser steps, they are searched together. Weights in
    16 bits round steps away that are much smaller than themselves: start such runs at 1e-4 or more. The rate is the
    best one for the first step and does not change later; a decay is the schedule's business.

    Args:
        score: What to maximise: a `Score`, or a function of the module that returns a number. It should be fine enough
            to tell small steps apart (a loss, a divergence; not an accuracy).
        optimizer_index: Which of several optimisers' rate is found; give each a callback of its own.

    Attributes:
        last_search: Report of the latest search, None before the first.

    Raises:
        ValueError: At the start of fit: the strategy is not supported, there is no such optimiser, the score cannot be
            taken, two of these look at the same optimiser, or EffOPD comes first.
    """

    def __init__(self, score: Score | Callable[[LightningModule], float], optimizer_index: int = 0) -> None:
        super().__init__(score, optimizer_index)
        self._key = f"learning_rate_line_search/{optimizer_index}"  # of its entry in checkpoints
        self.last_search: RateReport | None = None
        self._search: RateSearch | None = None
        self._restored: dict[str, Any] | None = None
        self._is_searching = False
        self._fitted: weakref.ref[LightningModule] | None = None

    @property
    def has_pending_search(self) -> bool:
        """Whether a step calls for a search that has not been finished."""
        return self._is_searching or (self._search is not None and self._search.is_due)

    @override
    def check_setup(self, callbacks: list[Callback]) -> None:
        before = callbacks[: callbacks.index(self)]
        if any(isinstance(other, EffOPD) for other in before):
            raise ValueError(
                "callbacks: EffOPD comes before LearningRateLineSearch, which would measure EffOPD's move instead of"
                " the optimiser's step. Put LearningRateLineSearch first."
            )
        if any(
            isinstance(other, LearningRateLineSearch) and other.optimizer_index == self.optimizer_index
            for other in before
        ):
            raise ValueError(
                f"callbacks: several LearningRateLineSearch look at optimiser {self.optimizer_index}. Keep one, or give"
                " each an optimizer_index of its own."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = self.find_optimizer(trainer)
        state, self._restored = self._restored, None
        is_same = self._fitted is not None and self._fitted() is pl_module
        if state is None and self._search is not None and is_same and trainer.global_step > 0:
            state = self._search.state_dict()  # the same run, fitted on
        self._fitted = weakref.ref(pl_module)
        search = self._search = RateSearch(optimizer)
        if state is not None:
            search.load_state_dict(state)
        self._is_searching = False

        def before_step(*_: Any) -> None:
            if search.will_search:
                reshard(pl_module)
            search.before_step()

        self._hooks = [
            search.optimizer.register_step_pre_hook(before_step),
            search.optimizer.register_step_post_hook(lambda *_: search.count_step()),
        ]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        search = self._search
        assert search is not None
        if not search.is_due:
            return
        self._is_searching = True  # and it stays so when a score raises
        self.begin_scores(trainer, pl_module)
        report = search.search(
            lambda: self.take_score(trainer, pl_module, seed=search.num_steps),
            [
                config.scheduler
                for config in trainer.lr_scheduler_configs
                if config.scheduler.optimizer is search.optimizer
            ],
            **self.around_search(pl_module),
        )
        self._is_searching = False
        if report is None:
            return
        self.last_search = report
        say(trainer, str(report))
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=trainer.global_step)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._search is not None:
            checkpoint[self._key] = self._search.state_dict()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._search, self._restored = None, checkpoint.get(self._key)
