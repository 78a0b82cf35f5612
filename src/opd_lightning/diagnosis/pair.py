"""`Pair`: a student and its teacher, ready to answer and to be compared on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.diagnosis.gradients import SIZES
from opd_lightning.interfaces import (
    MicroBatch,
    Objective,
    Prompt,
    Rollout,
    RolloutEngine,
    Sampling,
    ScoreRequest,
    Student,
    Task,
    Teacher,
    TrainedRollout,
)
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.objectives import full_log_probs
from opd_lightning.rollouts.answering import answer
from opd_lightning.rollouts.comparison import compare, make_micro_batches
from opd_lightning.rollouts.shaping import attach_log_ratios, attach_step, shape_groups

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass
class Pair:
    """A student and its teacher, and how to run them.

    Attributes:
        student: The student's description.
        teacher: The teacher.
        objective: The run's own; its temperatures are those of all measurements.
        task: Marks answers.
        engine: Answers with the student's weights.
        teacher_engine: Answers with the teacher's weights, where this process has them.
        sampling: How both answer.
        seed: Of the run.
        max_tokens: Most padded tokens that go through a model at once.
        k: Size of the top-k lists of the facts.
        precision: What training runs in.
        device: Where both are.
        model: The loaded student; None outside `loaded`.
    """

    student: Student
    teacher: Teacher
    objective: Objective
    task: Task
    engine: RolloutEngine
    teacher_engine: RolloutEngine
    sampling: Sampling
    seed: int
    max_tokens: int
    k: int = 16
    precision: Precision = nullcontext
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: nn.Module | None = None

    @property
    def request(self) -> ScoreRequest:
        """What the teacher is asked: all that it offers, up to the longest list that is compared."""
        offer, needed = self.teacher.offer, self.objective.request()
        top_k = min(max(self.k, *SIZES), offer.top_k)
        temperature = needed.temperature if needed is not None else 1.0
        return replace(offer, top_k=max(top_k, needed.top_k if needed is not None else 0), temperature=temperature)

    @property
    def draws_as_compared(self) -> bool:
        """Whether answers are drawn at the temperature that their tokens are compared at (greedy ones know 1)."""
        return (self.sampling.temperature or 1.0) == self.objective.student_temperature

    @property
    def speaker(self) -> tuple[Student, nn.Module] | None:
        """The teacher as a model that answers; None where this process cannot run it."""
        return self.teacher.as_student()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Load both, and let go of them afterwards. Their `preflight` has been passed."""
        self.model = self.student.load().to(self.device)
        try:
            with evaluation_mode(self.model):
                self.teacher.setup(self.student, self.model, self.device)
                self.engine.setup(self.student, self.device)
                self.engine.sync(self.model, 0)
                if (speaker := self.speaker) is not None:
                    self.teacher_engine.setup(speaker[0], self.device)
                    self.teacher_engine.sync(speaker[1], 0)
                yield
        finally:
            for each in (self.teacher, self.engine, self.teacher_engine):
                each.close()
            self.model = None

    def answer(self, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
        """Marked answers of the student, those of a prompt together."""
        with self.precision():
            return self._answer(self.engine, prompts)

    def answer_as_teacher(self, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
        """Marked answers of the teacher, in its own precision."""
        return self._answer(self.teacher_engine, prompts)

    def generate_as_teacher(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """Answers of the teacher, not marked."""
        with torch.no_grad():
            return self.teacher_engine.generate(prompts, sampling)

    def shape(self, rollouts: Sequence[Rollout], group_size: int) -> list[Rollout]:
        """Answers, those of a prompt together, with all that teacher and objective attach to them."""
        rollouts = shape_groups(self.teacher, rollouts, group_size)
        if self.objective.needs_log_ratios:
            batches = self.cut(rollouts)
            with self.precision():
                rollouts = attach_log_ratios(rollouts, batches, self.teacher.score_all(batches, self.request))
        return attach_step(shape_groups(self.objective, rollouts, group_size), 0)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """Answers of the student, not marked."""
        with torch.no_grad(), self.precision():
            return self.engine.generate(prompts, sampling)

    def candidates(self, rollouts: Sequence[Rollout], k: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The student's k likeliest tokens at the one trained position of each answer: ids, log p and log q, [k]."""
        assert self.model is not None, "the pair is not loaded"
        found = []
        for rollout in rollouts:
            (batch,) = self.cut([rollout])
            with torch.no_grad(), self.precision():
                logits = self.student.head(self.model)(self.student.hidden_states(self.model, batch))
                (scores,) = self.teacher.score_all([batch], self.request)
                log_p, ids = full_log_probs(logits, self.objective.student_temperature).topk(min(k, logits.shape[-1]))
                found.append((ids[0].cpu(), log_p[0].cpu(), scores.at(ids)[0].cpu()))
        return found

    def teacher_states(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The teacher's final hidden states [N, H] at the tokens of each answer; only where it can run here."""
        assert self.speaker is not None, "the teacher runs elsewhere"
        runner, model = self.speaker
        found = []
        for rollout in rollouts:
            (batch,) = make_micro_batches(
                [rollout], max_tokens=self.max_tokens, pad_id=self.student.tokenizer.pad_id, device=self.device
            )
            with torch.no_grad():
                found.append(runner.hidden_states(model, batch).float().cpu())
        return found

    def compare(self, rollouts: Sequence[Rollout]) -> list[TrainedRollout]:
        """Facts of every token of the student's answers, in the order of the answers."""
        assert self.model is not None, "the pair is not loaded"
        batches = self.cut(rollouts)
        found: list[TrainedRollout] = []
        with torch.no_grad(), self.precision():
            for compared in compare(
                self.student, self.model, batches, self.objective, self.teacher, self.request, facts_k=self.k
            ):
                found += compared.by_rollout()
        places = {id(rollout): place for place, rollout in enumerate(rollouts)}
        return sorted(found, key=lambda each: places[id(each.rollout)])

    def cut(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """Micro-batches of answers, longest first, on the device."""
        return make_micro_batches(
            rollouts, max_tokens=self.max_tokens, pad_id=self.student.tokenizer.pad_id, device=self.device
        )

    def _answer(self, engine: RolloutEngine, prompts: Sequence[Prompt]) -> list[list[Rollout]]:
        with torch.no_grad():
            return answer(engine, self.task, prompts, self.sampling, num_samples=len(prompts[0].seeds)).by_problem()
