"""Other ways to find a learning rate in the run, which found_rate.py compares the shipped line search with."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.extrapolation import scale_rates


class AcceptedFactors(EffOPD):
    """EffOPD whose accepted moves scale the learning rate too: by 1 + c after +c Delta, by 1 - c after -c Delta."""

    def __init__(self, score: Any) -> None:
        super().__init__(
            score, schedule="adaptive", candidates=(1.0, 3.0, 9.0, 27.0, 99.0), backward=(-0.5, -0.75, -0.9)
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Search as EffOPD does; then scale."""
        before = self.last_search
        super().on_train_batch_end(trainer, *args)
        if self.last_search is not None and self.last_search is not before:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scale_rates(trainer.optimizers[0], schedulers, 1 + self.last_search.best.factor)


class PolyakRate(Callback):
    """The stochastic Polyak step in Adam's geometry (arXiv 2504.01898): rate = share x f / (gradient . direction).

    The floor of f is 0: this student can represent its teacher. At most doubled from one step to the next.
    """

    last_search = None

    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A clipped gradient would not be that of f."""
        pl_module.gradient_clip_norm = None
        optimizer, last = trainer.optimizers[0], math.inf

        @torch.no_grad()
        def set_rate(*_: Any) -> None:
            nonlocal last
            value = pl_module.step_metrics.compute()["loss"]
            slope = 0.0
            for group in optimizer.param_groups:
                (beta_1, beta_2), eps = group["betas"], group["eps"]
                for weight in group["params"]:
                    grad, state = weight.grad, optimizer.state.get(weight, {})
                    if grad is None:
                        continue
                    step = float(state.get("step", 0)) + 1
                    mean = beta_1 * state.get("exp_avg", 0) + (1 - beta_1) * grad
                    square = beta_2 * state.get("exp_avg_sq", 0) + (1 - beta_2) * grad**2
                    scale = (square / (1 - beta_2**step)).sqrt() + eps
                    slope += float((grad * mean / (1 - beta_1**step) / scale).sum())
            rate = self.share * value / slope if slope > 0 else math.inf
            last = min(rate, 2 * last, 1e-2)
            for group in optimizer.param_groups:
                group["lr"] = last

        optimizer.register_step_pre_hook(set_rate)
