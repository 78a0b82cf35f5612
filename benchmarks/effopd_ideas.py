"""Variations on EffOPD that effopd_speedup.py tries out: when to search, along what, and what else to move."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.callbacks.effopd_scores import TaskAccuracy
from opd_lightning.rollouts.answering import Answers, answer, render_prompts
from opd_lightning.tasks import ArithmeticTask


class AccuracyOnLevels(TaskAccuracy):
    """`TaskAccuracy` on problems of other levels than those trained on."""

    def __init__(self, levels: Sequence[int], num_prompts: int = 50) -> None:
        super().__init__(num_prompts)
        self.problems = ArithmeticTask(levels=levels, seed=1).problems("train")[:num_prompts]

    def check(self, trainer: Any, module: Any) -> None:
        """Nothing to check: the problems are its own."""

    def answer_prompts(self, trainer: Any, module: Any) -> Answers:
        """Answer the problems, each with its own unchanging seed."""
        data, positions = trainer.datamodule, range(len(self.problems))
        seed_parts = (data.seed, "score")
        prompts = render_prompts(module.spec.tokenizer, self.problems, positions, num_samples=1, seed_parts=seed_parts)
        data.engine.sync(module.student, module.weight_version)
        answers = answer(data.engine, data.task, prompts, data.sampling, num_samples=1)
        self.tokens += sum(len(rollout.response_ids) for rollout in answers.rollouts)
        return answers


class AlwaysBack:
    """Stands in for a score and measures nothing: every forward candidate fails, the first backward one is accepted.

    A control for two-sided searches; with `schedule=4, backward=(-0.5,)` it is the Lookahead optimiser
    (arXiv 1907.08610) with k = 4 and alpha = 0.5.
    """

    def __init__(self) -> None:
        self._scores = itertools.cycle([0.0, -1.0, 0.0])  # current weights, forward, backward

    def __call__(self, module: Any) -> float:
        """The next made-up score."""
        return next(self._scores)


class MomentsEffOPD(EffOPD):
    """After an accepted move Adam's moments are moved by the same multiple of their own change, or forgotten."""

    def __init__(self, *args: Any, forget: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.forget = forget

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moments start at zero."""
        super().on_train_start(trainer, pl_module)
        self.older: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Search, and let the moments follow."""
        before = self.last_search
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.last_search is before or self.last_search is None:
            return
        factor = self.last_search.best.factor
        for i, state in enumerate(trainer.optimizers[0].state.values()):
            for name in ("exp_avg", "exp_avg_sq"):
                moment = state[name]
                if factor and self.forget and name == "exp_avg":
                    moment.zero_()
                elif factor and not self.forget:
                    change = moment - self.older.get((i, name), torch.zeros_like(moment))
                    # squares must not fall: a vanishing one would make the next step explode
                    moment.add_(change if name == "exp_avg" else change.clamp(min=0), alpha=factor)
                self.older[i, name] = moment.clone()


class GradientEffOPD(EffOPD):
    """Searches along the sum of the raw gradients since the search before, at the length of Delta."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to add up gradients."""
        super().on_train_start(trainer, pl_module)
        self.gradients: dict[str, Tensor] = {}
        named = dict(pl_module.named_parameters())

        def add_up(*_: Any) -> None:
            for name, weight in named.items():
                if weight.grad is not None:
                    self.gradients[name] = self.gradients.get(name, 0) + weight.grad

        trainer.optimizers[0].register_step_pre_hook(add_up)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Put the older point where the gradients say that it was, and search."""
        if not self._extrapolator.is_due:
            return
        weights = self._extrapolator._weights
        assert weights is not None
        state = weights.state_dict(gathered=False)
        changes = [weights.parameters[name] - anchor for name, anchor in state["anchor"].items()]
        norms = [torch.stack([part.norm() for part in of]).norm() for of in (changes, self.gradients.values())]
        scale = norms[0] / norms[1]
        state["anchor"] = {name: weights.parameters[name] + scale * self.gradients[name] for name in state["anchor"]}
        weights.load_state_dict(state)
        super().on_train_batch_end(trainer, pl_module, *args)
        self.gradients = {}
