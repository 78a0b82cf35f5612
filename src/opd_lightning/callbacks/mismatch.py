"""`MismatchAlarm`: warn when the engine that generates and the student that trains are no longer the same model.

Knows the names of two logged metrics only.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class MismatchAlarm(Callback):
    """Compares `train/rollout_mismatch` with a threshold: mean |log p_student - log p_engine| of the sampled tokens.

    An engine in bfloat16 beside a float32 student differs by hundredths; stale weights, another temperature or another
    model by tenths and more. Importance ratios are truncated, so such a run goes on quietly and learns from the wrong
    tokens. The metric's largest token (`train/rollout_mismatch_max`) is named too; single tokens may differ by a nat in
    half precision without harm.

    Args:
        threshold: In nats.
        every_n_steps: Warn at most so often.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(self, threshold: float = 0.1, every_n_steps: int = 50) -> None:
        for name, value in (("threshold", threshold), ("every_n_steps", every_n_steps)):
            if not value > 0:
                raise ValueError(f"MismatchAlarm.{name}: expected a positive number, got {value}.")
        self.threshold = threshold
        self.every_n_steps = every_n_steps
        self._last_warning: int | None = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        mismatch = float(trainer.callback_metrics.get("train/rollout_mismatch", 0.0))
        step = trainer.global_step
        is_quiet = self._last_warning is not None and step - self._last_warning < self.every_n_steps
        if mismatch > self.threshold and not is_quiet:  # NaN is no alarm: behind a top-p cut nothing is known
            self._last_warning = step
            largest = float(trainer.callback_metrics["train/rollout_mismatch_max"])
            warnings.warn(
                f"Step {step}: the student's log-probabilities of the sampled tokens differ from the engine's by"
                f" {mismatch:.3g} nats on average (threshold {self.threshold}; largest {largest:.3g}). Check that the"
                " engine got this step's weights, its dtype, quantization and kv_cache_dtype, the temperature of its"
                " log-probabilities, and that student and engine use the same context extension.",
                stacklevel=2,
            )
