"""What callbacks share that score weights in the middle of a fit and edit them: EffOPD, and the search for a rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from opd_lightning.extrapolation import reshard, undisturbed
from opd_lightning.interfaces import Score


class WeightSearch(Callback):
    """A callback that tries weights out, by a score, between steps of one of the module's optimisers.

    Args:
        score: What to maximise: a `Score`, or a function of the module that returns a number.
        optimizer_index: Which of several optimisers' steps are looked at.

    Raises:
        ValueError: The score is no function.
    """

    def __init__(self, score: Score | Callable[[LightningModule], float], optimizer_index: int) -> None:
        if not callable(score):
            raise ValueError(
                f"{type(self).__name__}.score: expected a Score or a function of the module, got {score!r}."
            )
        self.score = score
        self.optimizer_index = optimizer_index
        self._hooks: list[RemovableHandle] = []  # on the optimiser's steps, while training goes on

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies whose weights cannot be edited in place, and what `check_setup` refuses."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"strategy: {type(self).__name__} cannot edit weights under {type(trainer.strategy).__name__}. Use a"
                " single device, DDP, or FSDP2 (ModelParallelStrategy)."
            )
        self.check_setup(trainer.callbacks)  # type: ignore[attr-defined]

    def check_setup(self, callbacks: list[Callback]) -> None:
        """Refuse, before anything is trained, what does not go together with this one."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the score whether it can be taken here, before anything is trained."""
        if isinstance(self.score, Score):
            self.score.check(trainer, pl_module)

    def find_optimizer(self, trainer: Trainer) -> Optimizer:
        """The optimiser that is looked at.

        Raises:
            ValueError: There are not so many.
        """
        if not 0 <= self.optimizer_index < len(trainer.optimizers):
            raise ValueError(
                f"{type(self).__name__}.optimizer_index: expected a number from 0 to {len(trainer.optimizers) - 1}, one"
                f" for each optimiser of the module, got {self.optimizer_index}."
            )
        return trainer.optimizers[self.optimizer_index]

    def begin_scores(self, trainer: Trainer, module: LightningModule) -> None:
        """Tell the score that a search begins."""
        if isinstance(self.score, Score):
            self.score.begin(trainer, module)

    def take_score(self, trainer: Trainer, module: LightningModule, seed: int) -> float:
        """The score of the weights at hand: in eval mode, without gradients, from a random state made of the seed."""
        # Hooks run outside autocast, training does not: the score has to see the precision that training sees.
        with undisturbed(module, seed=seed), trainer.precision_plugin.forward_context():
            if isinstance(self.score, Score):
                return self.score(trainer, module)
            return self.score(module)

    def around_search(self, module: LightningModule) -> dict[str, Callable[[], Any]]:
        """What a search has to do besides scoring: gather before an edit, tell the module after it, count tokens."""
        return {
            "before_edit": lambda: reshard(module),
            "after_edit": getattr(module, "on_weights_moved", lambda: None),
            "count_tokens": lambda: getattr(self.score, "tokens", 0),
        }

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop looking at steps."""
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop looking at steps."""
        self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
