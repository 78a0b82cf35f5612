"""`OPDModule`: read top to bottom it is the algorithm.

A batch of the student's own rollouts comes in; the frozen teacher scores every token of them; the student moves towards
the teacher at exactly these states. Does not know which backend generated or scored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from opd_lightning.interfaces import MicroBatch, Rollout, RolloutBatch, Student, Teacher
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import Objective, sum_over_chunks
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.batching import collate, cut_by_tokens
from opd_lightning.training.checks import (
    check_engine_context,
    check_fit,
    check_optimizer,
    check_resume,
    check_teacher_context,
)
from opd_lightning.training.metrics import Means, SumAndCount, add_metrics, rollout_statistics
from opd_lightning.training.stopwatch import Stopwatch
from opd_lightning.training.student_module import StudentModule


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class OPDModule(StudentModule):
    """On-policy distillation of a student from a frozen teacher.

    One batch is one set of rollouts and, by default, one optimiser step. The loss is the sum over response tokens
    divided by their number over the whole step and all processes, so the gradient does not depend on micro-batches,
    padding, order or number of processes. The teacher is no submodule: no checkpoint, optimiser or DDP wrapper sees it.

    Args:
        student: The model to train.
        teacher: Who scores; needed by `fit` only.
        objective: What is minimised; None is `Objective()`, the full-vocabulary reverse KL.
        optimizer: Optimiser by class path; the default is AdamW with learning rate 1e-6 and no weight decay.
        lr_scheduler: Scheduler by class path, stepped once per optimiser step (`WarmupDecay` covers the usual ones).
        max_tokens_per_micro_batch: Most padded tokens (prompts included) that go through the student at once.
        updates_per_batch: Optimiser steps per rollout batch, each on its share of the rollouts. With more than one, the
            later ones are off-policy: choose an objective with an importance ratio.
        gradient_clip_norm: Clip the global gradient norm; None does not clip.
        max_skipped_steps: A step with a non-finite gradient is skipped; so many in a row stop the run.
        top_k_metrics: Size of the top-k sets that the overlap metrics compare; 0 leaves the teacher metrics out.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_tokens_per_micro_batch: int = 16384,
        updates_per_batch: int = 1,
        gradient_clip_norm: float | None = 1.0,
        max_skipped_steps: int = 5,
        top_k_metrics: int = 16,
    ) -> None:
        super().__init__(student)
        check_at_least(
            1,
            "model",
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            updates_per_batch=updates_per_batch,
            max_skipped_steps=max_skipped_steps,
        )
        check_at_least(0, "model", top_k_metrics=top_k_metrics)
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ValueError(f"model.gradient_clip_norm: expected a positive number or null, got {gradient_clip_norm}.")
        self.automatic_optimization = False
        self.teacher = teacher
        self.objective = objective if objective is not None else Objective()
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.updates_per_batch = updates_per_batch
        self.gradient_clip_norm = gradient_clip_norm
        self.max_skipped_steps = max_skipped_steps
        self.top_k_metrics = top_k_metrics
        self.num_skipped_steps = 0
        self.num_skipped_in_a_row = 0
        self.step_metrics = Means()
        self.last_rollouts: list[Rollout] = []
        self.resume_settings: dict[str, Any] = {}  # what a resumed run must share

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """Move the student towards the teacher on its own rollouts; returns the loss of every token, in nats."""
        is_fresh = batch.weight_version == self.weight_version
        assert is_fresh or batch.staleness, "rollouts must come from the weights they train"
        # dropout must not depend on how often the global generator was used before: a resumed run has used it less
        torch.manual_seed(derive_seed(self._data.seed, "dropout", batch.step, self.global_rank))
        self.stopwatch = Stopwatch(self.device)
        token_losses: list[tuple[Rollout, Tensor]] = []
        for share in self._shares(batch.rollouts):
            groups = cut_by_tokens(share, self.max_tokens_per_micro_batch)
            micro_batches = [collate(group, self.spec.tokenizer.pad_id).to(self.device) for group in groups]
            for group, losses in zip(groups, self.accumulate_gradients(micro_batches), strict=True):
                token_losses += zip(
                    group, torch.split(losses, [len(rollout.response_ids) for rollout in group]), strict=True
                )
            self.update_weights()
        self.last_rollouts = batch.rollouts
        self.log_step(batch)
        self._data.commit()
        return {"token_losses": token_losses}

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Backward through all micro-batches: gradient of the token sum over the global number of tokens.

        Returns:
            The loss of every token, [N] per micro-batch, on the CPU.
        """
        student = self.student
        assert student is not None and self.teacher is not None
        num_tokens = self._sum_over_ranks(sum(micro_batch.num_tokens for micro_batch in micro_batches))
        token_losses = []
        scores = iter(self.teacher.score_all(micro_batches, self.score_request))
        for i, micro_batch in enumerate(micro_batches):
            with self.stopwatch("teacher"):
                teacher_scores = next(scores)
            is_last = i == len(micro_batches) - 1
            with self.stopwatch("student"), nullcontext() if is_last else self._without_gradient_sync():
                hidden = self.spec.hidden_states(student, micro_batch)
                result = sum_over_chunks(
                    hidden,
                    lambda chunk: self.spec.logits(student, chunk),
                    self.objective,
                    teacher_scores,
                    micro_batch.response_ids,
                    micro_batch.rollout_log_probs,
                    answers=self.score_request if self.top_k_metrics else None,
                    statistics_k=self.top_k_metrics,
                )
                # DDP averages over processes; the loss is a sum over all of them
                self.manual_backward(result.loss_sum * (self.trainer.world_size / num_tokens))
            num_padded = micro_batch.attention_mask.numel()
            self.step_metrics.update(
                {
                    "loss": (result.loss_sum.detach(), micro_batch.num_tokens),
                    "padding_share": (num_padded - micro_batch.attention_mask.sum(), num_padded),
                }
            )
            self.step_metrics.update(result.statistics.sums, result.statistics.maxima)
            token_losses.append(result.token_losses.cpu())
        return token_losses

    def prefetch(self, rollout: Rollout, step: int) -> None:
        """Let a teacher that can begin to score a rollout of this step, from any thread."""
        assert self.teacher is not None
        self.teacher.prefetch(rollout, self.score_request, step)

    def update_weights(self) -> None:
        """Clip and step; skip the step when the gradient is not finite."""
        assert self.student is not None
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        with self.stopwatch("optimizer"):
            norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm or torch.inf)
            if torch.isfinite(norm):
                self.step_metrics.update(
                    {"grad_norm": (norm, 1), "learning_rate": (optimizer.param_groups[0]["lr"], 1)}
                )
                self.weight_version += 1  # before the step: one that is interrupted has changed the weights too
                optimizer.step()
                self.num_skipped_in_a_row = 0
                if scheduler is not None:
                    scheduler.step()
            else:
                self._skip_step(float(norm))
            optimizer.zero_grad()

    def _skip_step(self, norm: float) -> None:
        self.num_skipped_steps += 1
        self.num_skipped_in_a_row += 1
        warnings.warn(
            f"Step skipped: the gradient norm is {norm} ({self.num_skipped_steps} skipped so far)."
            " Check the learning rate, the precision and the teacher's scores.",
            stacklevel=2,
        )
        if self.num_skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"model.max_skipped_steps: {self.num_skipped_in_a_row} steps in a row had a non-finite gradient. The"
                " weights are those of the last good step. Lower the learning rate, train in fp32 or bf16-mixed, or"
                " look at the teacher's scores; then resume from the last checkpoint."
            )

    # ---------------------------------------------------------------------------------------------------------- setup

    def setup(self, stage: str) -> None:
        """Check, before any weight is loaded, that objective, teacher, student and sampling fit together."""
        super().setup(stage)
        if stage != "fit":
            return
        check_fit(
            teacher=self.teacher,
            objective=self.objective,
            data=self._data,
            trainer=self.trainer,
            updates_per_batch=self.updates_per_batch,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
        )
        assert self.teacher is not None
        self.score_request = add_metrics(self.objective.request(), self.teacher.offer, self.top_k_metrics)
        self.teacher.preflight(self.spec)
        check_teacher_context(self.teacher, self._data)
        self.resume_settings = {
            **self._data.resume_settings,
            **check_optimizer(self.make_optimizer, self.make_lr_scheduler),
        }

    def configure_optimizers(self) -> Any:
        """Optimiser over the trainable weights, and the scheduler if there is one."""
        assert self.student is not None
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("model.student: no weight is trainable. Check the LoRA settings.")
        optimizer = self.make_optimizer(parameters)
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    def on_fit_start(self) -> None:
        """Load the teacher beside the student and hand the student to the engine."""
        assert self.teacher is not None and self.student is not None
        self.teacher.setup(self.spec, self.student, self.device)
        self._data.engine.setup(self.spec, self.device)
        check_engine_context(self._data)

    def teardown(self, stage: str) -> None:
        """Close the teacher."""
        if self.teacher is not None:
            self.teacher.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters of skipped steps, and what a resumed run must share."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["opd_lightning"]["skipped"] = [self.num_skipped_steps, self.num_skipped_in_a_row]
        checkpoint["opd_lightning"]["settings"] = self.resume_settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters of skipped steps."""
        super().on_load_checkpoint(checkpoint)
        check_resume(checkpoint["opd_lightning"]["settings"], self.resume_settings)
        self.num_skipped_steps, self.num_skipped_in_a_row = checkpoint["opd_lightning"]["skipped"]

    # ------------------------------------------------------------------------------------------------------- internals

    def _shares(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        """The rollouts of each optimiser step of this batch."""
        return [list(rollouts[i :: self.updates_per_batch]) for i in range(self.updates_per_batch)]

    def _without_gradient_sync(self) -> AbstractContextManager[None]:
        strategy: Any = self.trainer.strategy
        block = getattr(strategy, "block_backward_sync", None)
        return block() if block is not None else nullcontext()

    def _sum_over_ranks(self, count: int) -> int:
        total: Tensor = self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="sum")
        return int(total)

    def log_step(self, batch: RolloutBatch) -> None:
        """Reduce and log everything known about this step."""
        pairs: dict[str, SumAndCount] = dict(rollout_statistics(batch.rollouts))
        num_tokens = batch.num_response_tokens
        seconds = batch.seconds | self.stopwatch.seconds
        for part in ("generate", "teacher", "student"):
            pairs[f"tokens_per_second/{part}"] = (num_tokens, seconds[part])
        for part, value in seconds.items():
            pairs[f"seconds/{part}"] = (value, 1)
        self.step_metrics.update(pairs)
        values = self.step_metrics.compute()
        self.step_metrics.reset()
        values["skipped_steps"] = float(self.num_skipped_steps)
        values["weight_version"] = float(self.weight_version)
        values["staleness"] = float(batch.staleness)
        shown = ("reverse_kl", "accuracy")
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=1)
        self.log_dict({f"selection/{k}": v for k, v in self._data.selector.metrics().items()}, batch_size=1)
