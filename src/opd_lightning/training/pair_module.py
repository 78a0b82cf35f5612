"""`PairModule`: a student and its frozen teacher, side by side: loads both, compares them on rollouts.

`OPDModule` adds the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from opd_lightning.distributed import is_sharded, largest
from opd_lightning.interfaces import MicroBatch, Objective, Rollout, RolloutBatch, ScoreRequest, Student, Teacher
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import NLL, known_facts
from opd_lightning.rollouts.batching import blank_micro_batch
from opd_lightning.rollouts.comparison import Clock, Comparison, compare, make_micro_batches
from opd_lightning.rollouts.shaping import attach_log_ratios, attach_step, shape_groups
from opd_lightning.training.checks import check_teacher
from opd_lightning.training.metrics import Means, add_metrics, fact_statistics
from opd_lightning.training.student_module import StudentModule

HELD_OUT_FACTS = ("reverse_kl", "sampled_log_ratio", "student_entropy", "teacher_entropy", "overlap_ratio")


class _ClosesTeacher(Callback):
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.teardown("fit")


class PairModule(StudentModule):
    """Holds a student and a frozen teacher. The teacher is no submodule: no checkpoint or optimiser sees it.

    But what training itself changes in a teacher, a moving average, is in the checkpoint (`Teacher.state_dict`).

    Args:
        student: What is trained.
        teacher: Who scores; None where nothing is asked of one.
        objective: What is measured between the two.
        max_tokens_per_micro_batch: Most padded tokens (prompts included) that go through the student at once.
        facts_k: Size of the top-k sets of the facts; 0 knows no facts.

    Attributes:
        score_request: What the teacher is asked; None without a teacher, and before `setup`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        objective: Objective,
        max_tokens_per_micro_batch: int,
        facts_k: int,
    ) -> None:
        super().__init__(student)
        check_at_least(1, "model", max_tokens_per_micro_batch=max_tokens_per_micro_batch)
        self.teacher = teacher
        self.objective = objective
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.facts_k = facts_k
        self.score_request: ScoreRequest | None = None
        self.held_out_facts = Means()
        self._has_restored_teacher = False

    def setup(self, stage: str) -> None:
        """Check, before any weight is loaded, that the teacher speaks the student's tokens."""
        super().setup(stage)
        if self.teacher is not None and (stage == "fit" or self.measures_held_out):
            if (request := self.objective.request()) is not None:
                self.teacher.check(request)
            self.score_request = add_metrics(request, self.teacher.offer, self.facts_k)
            check_teacher(self.teacher, self.spec, self.data, self.measures_held_out)

    def on_fit_start(self) -> None:
        """Load the teacher beside the student, and tell the data module that the student is there."""
        self.load_teacher()
        self.data.connect(self, self.device)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.measures_held_out and self.trainer.state.fn != "fit":
            self.load_teacher()

    on_test_start = on_validation_start

    def load_teacher(self) -> None:
        """Load the teacher; one that follows the student begins anew with a new training only."""
        if self.teacher is None:
            return
        begins = self.trainer.state.fn == "fit" and self.trainer.global_step == 0
        if not (begins or self._has_restored_teacher) and (state := self.teacher.state_dict()):
            self.teacher.load_state_dict(state)
        self._has_restored_teacher = False
        self.teacher.setup(self.spec, self.model, self.device)

    def teardown(self, stage: str) -> None:
        """Close the teacher."""
        if self.teacher is not None:
            self.teacher.close()

    def configure_callbacks(self) -> list[Callback]:
        """Close the teacher after an error as well, when Lightning tears nothing down."""
        return [_ClosesTeacher()]

    def lead_teacher(self) -> None:
        """Tell the teacher of an optimiser step: one that follows the student moves on."""
        if self.teacher is not None:
            self.teacher.follow()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None and (state := self.teacher.state_dict()):
            checkpoint["opd_lightning"]["teacher"] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.teacher is not None and (self.trainer.state.fn == "fit" or self.measures_held_out):
            self.teacher.load_state_dict(checkpoint["opd_lightning"].get("teacher", {}))
            self._has_restored_teacher = True

    def give_context(self, rollouts: Sequence[Rollout], group_size: int | None = None) -> Sequence[Rollout]:
        """Rollouts with all that the teacher reads of whole groups.

        Args:
            rollouts: Those of a prompt next to each other.
            group_size: How many of each prompt; None is as many as in training.
        """
        if self.teacher is None:
            return rollouts
        return shape_groups(self.teacher, rollouts, group_size or self.data.rollouts_per_prompt)

    def make_micro_batches(self, rollouts: Sequence[Rollout], at_least: int = 1) -> list[MicroBatch]:
        """Cut rollouts under the token budget, into so many parts at least, and put them on the device."""
        return make_micro_batches(
            rollouts,
            max_tokens=self.max_tokens_per_micro_batch,
            pad_id=self.spec.tokenizer.pad_id,
            device=self.device,
            at_least=at_least,
        )

    def cut_step(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """The step's micro-batches: as many on each process where all must run a student together that is cut up."""
        micro_batches = self.make_micro_batches(rollouts)
        if not is_sharded(self.model):
            return micro_batches
        return self.make_micro_batches(rollouts, at_least=largest(len(micro_batches), self.device))

    def compare(
        self,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        request: ScoreRequest | None,
        teacher: Teacher | None = None,
        **options: Any,
    ) -> Iterator[Comparison]:
        """Student against teacher (or who else has its scores), as `rollouts.comparison.compare`."""
        with self.keeping_pace(len(micro_batches)):
            teacher = teacher or self.teacher
            yield from compare(self.spec, self.model, micro_batches, objective, teacher, request, **options)

    @contextmanager
    def keeping_pace(self, num_passes: int) -> Iterator[None]:
        """Around so many passes of the student on this process: afterwards it has run as often as on the others.

        Where a student is cut up, all gather each layer together. With gradients nothing is done: `cut_step` has.
        """
        num_missing = 0
        if is_sharded(self.model) and not torch.is_grad_enabled():
            num_missing = largest(num_passes, self.device) - num_passes
        yield
        for _ in range(num_missing):
            self.spec.hidden_states(self.model, blank_micro_batch(self.spec.tokenizer.pad_id).to(self.device))

    def shape(
        self, batch: RolloutBatch, teacher: Teacher | None = None, clock: Clock = lambda part: nullcontext()
    ) -> list[Rollout]:
        """A step's rollouts with all that teacher and objective attach to them.

        Args:
            batch: The step.
            teacher: Who has its scores; None asks the teacher.
            clock: Measures the part "teacher".
        """
        rollouts, asked = self.give_context(batch.rollouts), teacher or self.teacher
        if self.objective.needs_log_ratios and asked is not None:
            cut = self.make_micro_batches(rollouts)
            assert self.score_request is not None
            with clock("teacher"), self.autocast():
                rollouts = attach_log_ratios(rollouts, cut, asked.score_all(cut, self.score_request))
        return attach_step(shape_groups(self.objective, rollouts, self.data.rollouts_per_prompt), batch.step)

    @override
    def announce(self, rollout: Rollout, step: int) -> None:
        """Let a teacher that can begin to score a rollout of this step, from any thread."""
        if self.teacher is not None and self.score_request is not None:
            self.teacher.prefetch(rollout, self.score_request, step)

    @property
    def measures_held_out(self) -> bool:
        """Whether held-out answers are compared with the teacher: where the task has no marks for them."""
        return self.teacher is not None and bool(self.facts_k) and not self.data.task.is_graded

    @override
    def study_answers(self, rollouts: Sequence[Rollout]) -> None:
        """Compare held-out answers with the teacher, where they are not marked."""
        if not self.measures_held_out:
            return
        known = [name for name in HELD_OUT_FACTS if name in known_facts(self.score_request, self.facts_k)]
        self.held_out_facts.update(dict.fromkeys(known, (0.0, 0)))  # a process may have no answers of its own
        # not the run's own objective: its losses may read what is attached to training rollouts only
        plain = NLL(self.objective.chunk_tokens)
        plain.student_temperature = self.objective.student_temperature
        batches = self.make_micro_batches(self.give_context(rollouts, self.data.validation_samples))
        for compared in self.compare(batches, plain, self.score_request, facts_k=self.facts_k):
            self.held_out_facts.update(fact_statistics(compared.facts, HELD_OUT_FACTS))

    @override
    def log_answers(self, stage: str) -> None:
        super().log_answers(stage)
        for name, value in self.held_out_facts.compute().items() if self.measures_held_out else ():
            self.log(f"{stage}/{name}", value, prog_bar=name == "reverse_kl", batch_size=1, sync_dist=True)
        self.held_out_facts.reset()
