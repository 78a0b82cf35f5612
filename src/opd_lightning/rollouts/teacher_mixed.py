"""`TeacherMixed`: the teacher has a say in every token that the student writes (arXiv 2306.08543)."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from opd_lightning.interfaces import (
    Blend,
    LiveStudent,
    Problem,
    RolloutBatch,
    RolloutEngine,
    Sampling,
    StepPrompts,
    Teacher,
    Tokenizer,
)
from opd_lightning.rollouts.on_policy import OnPolicy


class TeacherMixed(OnPolicy):
    """Each token is drawn from (1 - share) p + share q: most of the student's distribution, some of the teacher's.

    `Rollout.log_probs` are those of the mixture, so that p / p_rollout is the weight which an objective's `importance`
    gives each token. Held-out problems are answered by the student alone. The very weights that score are read token
    by token beside the student's, so both models generate.

    Args:
        teacher_share: Of the teacher, in [0, 1]; 0 is `OnPolicy`.

    Raises:
        ValueError: It is outside; from `setup`, the engine draws from one model; from `check_teacher`, the teacher only
            scores.

    Source: arXiv 2306.08543, section 2.2 (alpha = 0.2).
    """

    def __init__(self, teacher_share: float = 0.2) -> None:
        if not 0 <= teacher_share <= 1:
            raise ValueError(f"source.teacher_share: expected a number in [0, 1], got {teacher_share}.")
        self.teacher_share = teacher_share
        self._blend: Blend | None = None

    asks_engine = True

    @property
    @override
    def staleness(self) -> int | None:
        return None if self.teacher_share else 0

    @override
    def setup(self, engine: RolloutEngine) -> None:
        if self.teacher_share and not engine.blends:
            raise ValueError(
                f"data.engine: TeacherMixed draws each token from two models at once, and {type(engine).__name__} draws"
                " from one. Use HFEngine without static_shapes."
            )
        super().setup(engine)

    @override
    def check_teacher(self, teacher: Teacher | None, is_cut_up: bool) -> None:
        if self.teacher_share and (teacher is None or not teacher.is_here(is_cut_up)):
            raise ValueError(_needs(teacher))

    @override
    def admit(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, sampling: Sampling, num_rollouts: int
    ) -> list[Problem]:
        if self.teacher_share and sampling.temperature == 0:
            raise ValueError(
                "data.sampling.temperature: TeacherMixed draws from a mixture of two distributions, expected a number"
                " above 0, got 0. Set it to 1."
            )
        return super().admit(problems, tokenizer, sampling, num_rollouts)

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        if not self.teacher_share:
            return super().rollouts(step, sampling, student)
        with self.engine.blended(self._teacher_of(student)):
            batch = super().rollouts(step, sampling, student)
        batch.staleness = None
        return batch

    @override
    def close(self) -> None:
        self._blend = None  # which has the teacher's weights

    def _teacher_of(self, student: LiveStudent) -> Blend:
        teacher = student.teacher
        loaded = None if teacher is None else teacher.as_student()
        if teacher is None or loaded is None:
            raise ValueError(_needs(teacher))
        if self._blend is None or self._blend.model is not loaded[1]:
            self._blend = Blend(teacher.as_answerer(student.spec), loaded[1], self.teacher_share)
        return self._blend


def _needs(teacher: Teacher | None) -> str:
    name = None if teacher is None else type(teacher).__name__
    return (
        f"data.source: TeacherMixed needs a teacher whose model lies in this process, got {name}. Use an"
        " HFTeacher that is not quantised, with offload: false (and under fsdp2 sharded: false)."
    )
