"""`OPDModule`: read top to bottom it is the algorithm.

A batch of the student's own rollouts comes in; the frozen teacher scores every token of them; the student moves towards
the teacher at exactly these states. Does not know which backend generated or scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from opd_lightning.distributed import gathered
from opd_lightning.interfaces import (
    MicroBatch,
    Objective,
    Rollout,
    RolloutBatch,
    StepFacts,
    Student,
    Teacher,
    TokenWeighting,
    TrainedRollout,
)
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.objectives.supports import DEFAULT_K
from opd_lightning.objectives.token_weights import divide_gradients, known_divisor, loss_factors, weigh_tokens
from opd_lightning.randomness import derive_seed, seed_generators
from opd_lightning.rollouts.comparison import Comparison
from opd_lightning.teachers import KeptScores
from opd_lightning.training.checkpoints import check_resumable
from opd_lightning.training.checks import check_fit, check_horizon, check_weighting
from opd_lightning.training.first_look import look_first
from opd_lightning.training.metrics import Means, comparison_statistics, log_values, rollout_statistics, speeds
from opd_lightning.training.pair_module import PairModule
from opd_lightning.training.resuming import check_resume, describe_run, override_optimizer
from opd_lightning.training.skipped_steps import SkippedSteps
from opd_lightning.training.stopwatch import Stopwatch
from opd_lightning.training.usable_weights import check_weights


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class OPDModule(PairModule):
    """On-policy distillation of a student from a frozen teacher.

    One batch is one set of rollouts and one optimiser step. The loss is the sum over response tokens
    divided by their number over the whole step and all processes, so the gradient does not depend on micro-batches,
    padding, order or number of processes. The teacher is no submodule: no checkpoint, optimiser or DDP wrapper sees it.

    Args:
        student: The model to train.
        teacher: Who scores; needed by `fit` only, and there unless the objective does without.
        objective: What is minimised; None is `DivergenceObjective()`, the full-vocabulary reverse KL.
        token_weighting: How much each response token counts; None: all the same.
        optimizer: Optimiser by class path; the default is AdamW with learning rate 1e-6 and no weight decay.
        lr_scheduler: Scheduler by class path, stepped once per optimiser step (`WarmupDecay` covers the usual ones).
        max_tokens_per_micro_batch: Most padded tokens (prompts included) that go through the student at once.
        gradient_clip_norm: Clip the global gradient norm; None does not clip.
        max_skipped_steps: A step with a non-finite gradient is skipped; so many in a row stop the run.
        top_k_metrics: Size of the top-k sets that the overlap metrics compare; 0 leaves the token metrics out.
        exact_timings: Wait for the GPU around each part of a step, so that `train/seconds/*` are true.
        measure_memory: Log the most memory held during each part of a step, `train/memory_gb/*`.
        override_optimizer_on_resume: Resume with this run's optimiser settings and scheduler, not the checkpoint's.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None = None,
        objective: Objective | None = None,
        token_weighting: TokenWeighting | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_tokens_per_micro_batch: int = 16384,
        gradient_clip_norm: float | None = 1.0,
        max_skipped_steps: int = 5,
        top_k_metrics: int = 16,
        exact_timings: bool = True,
        measure_memory: bool = False,
        override_optimizer_on_resume: bool = False,
    ) -> None:
        reads_facts = token_weighting is not None and bool(token_weighting.reads)
        super().__init__(
            student,
            teacher,
            objective if objective is not None else DivergenceObjective(),
            max_tokens_per_micro_batch,
            facts_k=top_k_metrics or (DEFAULT_K if reads_facts else 0),
        )
        check_at_least(1, "model", max_skipped_steps=max_skipped_steps)
        check_at_least(0, "model", top_k_metrics=top_k_metrics)
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise ValueError(f"model.gradient_clip_norm: expected a positive number or null, got {gradient_clip_norm}.")
        self.automatic_optimization = False
        self.token_weighting = token_weighting
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.gradient_clip_norm, self.skipped = gradient_clip_norm, SkippedSteps(max_skipped_steps)
        self.exact_timings, self.measure_memory = exact_timings, measure_memory
        self.override_optimizer_on_resume = override_optimizer_on_resume
        self.step_metrics = Means()
        self.last_rollouts: list[Rollout] = []
        self.kept_scores: KeptScores | None = None
        self.resume_settings: dict[str, Any] = {}  # what a resumed run must share

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Any]:
        """Move the student towards the teacher on the batch's rollouts.

        Returns:
            "facts": `StepFacts`, what became known of every token; "ends_round": whether the next step gets new
            rollouts.
        """
        assert batch.weight_version == self.weight_version or batch.staleness != 0, "these rollouts are not on-policy"
        # dropout must depend neither on how often the global generator was used before (a resumed run has used it less)
        # nor on the process, of which there may be more
        seed_generators(derive_seed(self.data.seed, "dropout", batch.step), self.device)
        self.stopwatch.restart()
        teacher = self.teacher_of(batch)
        rollouts = self.shape(batch, teacher, self.stopwatch)
        trained = self.accumulate_gradients(self.cut_step(rollouts), teacher)
        self.update_weights()
        self.last_rollouts = batch.rollouts
        self.log_step(batch)
        facts = StepFacts(batch.step, tuple(trained))
        self.data.observe(facts)
        return {"facts": facts, "ends_round": self.data.source.num_steps_wanted > 0}

    def on_searched(self, factor: float) -> None:
        """Called after a search (EffOPD) has moved the weights by this multiple of their recent change, or by 0."""
        self.data.source.observe_search(factor)

    def teacher_of(self, batch: RolloutBatch) -> Teacher | None:
        """Who scores this batch: the teacher, or what it said of the round that the batch is a part of."""
        part = batch.round
        if self.teacher is None or self.teacher.changes or self.score_request is None or part is None:
            return self.teacher
        if self.kept_scores is None:
            self.kept_scores = KeptScores(self.teacher)
        if part.num_passes == 1:
            self.kept_scores.forget()
        else:
            with self.stopwatch("teacher"):
                cut = self.make_micro_batches(self.give_context(part.rollouts))
                self.kept_scores.score_round(part.index, cut, self.score_request, part.max_score_bytes)
        self.step_metrics.update({"kept_score_bytes": (self.kept_scores.num_bytes, 1)})
        return self.kept_scores

    def accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch], teacher: Teacher | None
    ) -> list[TrainedRollout]:
        """Backward through all micro-batches: gradient of the weighted token sum over the step's global divisor."""
        weighting = self.token_weighting
        normalizer = weighting.normalizer if weighting is not None else "all_tokens"
        num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
        total_weight = torch.zeros((), device=self.device)
        trained: list[TrainedRollout] = []
        done: list[Comparison] = []
        compare = partial(self.compare, objective=self.objective, request=self.score_request, clock=self.stopwatch)
        if looks := weighting is not None and weighting.looks_first:
            seen = compare(micro_batches, teacher=teacher, facts_k=self.facts_k)
            rollouts, trained = look_first(weighting, seen, self.step_metrics)
            micro_batches, teacher = self.cut_step(rollouts), self.teacher  # kept scores are of whole ones
        divisor = known_divisor(normalizer, micro_batches)
        num_divided = self._sum_over_ranks(divisor) if divisor is not None else 1.0
        facts_k = 0 if looks else self.facts_k
        comparisons = compare(micro_batches, teacher=teacher, facts_k=facts_k, counts_alike=weighting is None or looks)
        for i, compared in enumerate(comparisons):
            is_last = i == len(micro_batches) - 1
            with self.stopwatch("student"), nullcontext() if is_last else self._without_gradient_sync():
                losses = compared.losses
                if weighting is not None:
                    weights = weigh_tokens(weighting, compared.facts, compared.micro_batch)
                    losses = loss_factors(weights, normalizer, compared.micro_batch) * losses
                    total_weight += weights.sum()
                # DDP averages over processes; the loss is a sum over all of them
                self.manual_backward(losses.sum() * (self.trainer.world_size / num_divided))
            done.append(compared.detached())
        if not looks:
            self.step_metrics.update(*comparison_statistics(done))
            trained = [rollout for compared in done for rollout in compared.by_rollout()]
        if weighting is not None:
            self.step_metrics.update({"token_weight": (total_weight, num_tokens)})
        if divisor is None:
            divide_gradients(self.model.parameters(), self._sum_over_ranks(total_weight))
        return trained

    def update_weights(self) -> None:
        """Clip and step; skip the step when the gradient is not finite."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        with self.stopwatch("optimizer"):
            norm = gathered(nn.utils.clip_grad_norm_(parameters, self.gradient_clip_norm or torch.inf))
            if torch.isfinite(norm):
                rate = optimizer.param_groups[0]["lr"]
                self.step_metrics.update({"grad_norm": (norm, 1), "learning_rate": (rate, 1)})
                self.weight_version += 1  # before the step: one that is interrupted has changed the weights too
                optimizer.step()
                self.skipped.forget_row()
                self.lead_teacher()
                if scheduler is not None:
                    scheduler.step()
            else:
                self.skipped.count(float(norm), self.trainer)
            optimizer.zero_grad()

    # ---------------------------------------------------------------------------------------------------------- setup

    def on_fit_start(self) -> None:
        """Load the teacher; what it said in an earlier fit counts no longer."""
        super().on_fit_start()
        self.kept_scores = None
        self.stopwatch = Stopwatch(self.device, is_exact=self.exact_timings, measures_memory=self.measure_memory)

    def setup(self, stage: str) -> None:
        """Check, before any weight is loaded, that objective, teacher, student and sampling fit together."""
        if stage == "fit":
            self._check_fit()
        super().setup(stage)
        if stage == "fit":
            check_weighting(self.token_weighting, self.score_request, self.facts_k)
            check_horizon(self.data.horizon, self.score_request, self.facts_k)

    def _check_fit(self) -> None:
        check_fit(
            teacher=self.teacher,
            objective=self.objective,
            data=self.data,
            trainer=self.trainer,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            facts_k=self.facts_k,
        )
        self.resume_settings = describe_run(self, self.data)

    def configure_optimizers(self) -> Any:
        """Optimiser over the trainable weights, and the scheduler if there is one."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("model.student: no weight is trainable. Check the LoRA settings.")
        optimizer = self.make_optimizer(parameters)
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_scheduler(optimizer)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters of skipped steps, and what a resumed run must share; weights that diverged stop the run."""
        super().on_save_checkpoint(checkpoint)
        check_weights(self)
        checkpoint["opd_lightning"]["skipped"] = [self.skipped.total, self.skipped.in_a_row]
        checkpoint["opd_lightning"]["settings"] = self.resume_settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters of skipped steps."""
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            check_resumable(checkpoint)
            check_resume(checkpoint["opd_lightning"]["settings"], self.resume_settings)
            if self.override_optimizer_on_resume:
                override_optimizer(checkpoint, self.make_optimizer, self.make_lr_scheduler)
        self.skipped.total, self.skipped.in_a_row = checkpoint["opd_lightning"]["skipped"]

    # ------------------------------------------------------------------------------------------------------- internals

    def _without_gradient_sync(self) -> AbstractContextManager[None]:
        strategy: Any = self.trainer.strategy
        block = getattr(strategy, "block_backward_sync", None)
        return block() if block is not None else nullcontext()

    def _sum_over_ranks(self, count: int | Tensor) -> float:
        return float(self.trainer.strategy.reduce(torch.as_tensor(count, device=self.device), reduce_op="sum"))

    def log_step(self, batch: RolloutBatch) -> None:
        """Reduce and log everything known about this step."""
        measured = rollout_statistics(batch.rollouts) | speeds(batch, batch.seconds | self.stopwatch.seconds)
        self.step_metrics.update(measured, {f"memory_gb/{part}": gb for part, gb in self.stopwatch.memory_gb.items()})
        values = self.step_metrics.compute()
        self.step_metrics.reset()
        values |= {"skipped_steps": float(self.skipped.total), "weight_version": float(self.weight_version)}
        if batch.staleness is not None:
            values["staleness"] = float(batch.staleness)
        if batch.round is not None:
            values["round"], values["pass"] = float(batch.round.index), float(batch.round.pass_index)
        if self.data.horizon is not None:
            values["horizon"] = float(batch.sampling.max_new_tokens)
            is_cut = batch.sampling.max_new_tokens < self.data.sampling.max_new_tokens
            values["horizon_cut_rate"] = values.pop("truncation_rate") if is_cut else 0.0
        shown = ("reverse_kl" if "reverse_kl" in values else "sampled_log_ratio", "accuracy")
        values = {f"train/{name}": value for name, value in values.items()}
        values |= {f"selection/{name}": float(value) for name, value in self.data.selector.metrics().items()}
        log_values(self, "training_step", values, {f"train/{name}" for name in shown})
