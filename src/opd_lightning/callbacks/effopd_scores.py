"""Scores for EffOPD in an `OPDModule` run: task accuracy, and closeness to the teacher with or without new rollouts.

All split their work over processes and compare candidates on common random numbers: a prompt's seed never changes.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from opd_lightning.interfaces import Objective, Problem, Rollout, Score, Teacher
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.rollouts.answering import Answers, render_prompts
from opd_lightning.teachers import KeptScores
from opd_lightning.training.module import OPDModule


class _MeanOverProcesses(Score):
    """A (sum, count) of each process, added up and divided once."""

    @override
    def __call__(self, trainer: Any, module: OPDModule) -> float:
        total, count = self.sum_and_count(trainer, module)
        both = torch.tensor([total, count], dtype=torch.float64, device=module.device)
        total, count = trainer.strategy.reduce(both, reduce_op="sum").tolist()
        return float(total / count)

    @abstractmethod
    def sum_and_count(self, trainer: Any, module: OPDModule) -> tuple[float, float]:
        """This process's share."""


class _OnFreshRollouts(_MeanOverProcesses):
    """Answers a fixed set of training prompts with the weights at hand.

    Attributes:
        uids: The prompts' problems, once chosen.
        tokens: Response tokens generated so far on this process.
    """

    def __init__(self, num_prompts: int = 50, num_samples: int = 1) -> None:
        check_at_least(1, type(self).__name__, num_prompts=num_prompts, num_samples=num_samples)
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.uids: list[str] = []
        self.tokens = 0

    @override
    def check(self, trainer: Any, module: OPDModule) -> None:
        self.choose_problems(trainer)

    def choose_problems(self, trainer: Any) -> list[Problem]:
        """The problems scored on, said once.

        Raises:
            ValueError: There are not so many.
        """
        data = trainer.datamodule
        problems: list[Problem] = data.problems_for_scores(self.num_prompts)
        if not self.uids:
            self.uids = [problem.uid for problem in problems]
            kept_out = "kept out of training" if data.num_reserved >= len(problems) else "also trained on"
            rank_zero_info(
                f"{type(self).__name__} scores on {len(problems)} prompts, {kept_out}: {', '.join(self.uids)}"
            )
        return problems

    def seed_parts(self, trainer: Any) -> tuple[int | str, ...]:
        """What the seeds of samples depend on, beside prompt and sample: nothing that changes."""
        return (trainer.datamodule.seed, "score")

    def answer_prompts(self, trainer: Any, module: OPDModule) -> Answers:
        """Answer this process's share of the prompts, each sample with a seed of its own."""
        data, problems = trainer.datamodule, self.choose_problems(trainer)
        positions = list(range(len(problems)))[trainer.global_rank :: trainer.world_size]
        prompts = render_prompts(
            module.spec.tokenizer,
            [problems[i] for i in positions],
            positions,
            num_samples=self.num_samples,
            seed_parts=self.seed_parts(trainer),
        )
        answers: Answers = data.answer(prompts, data.sampling, num_samples=self.num_samples)
        self.tokens += sum(len(rollout.response_ids) for rollout in answers.rollouts)
        return answers


class TaskAccuracy(_OnFreshRollouts):
    """Mean reward on n training prompts, the score of arXiv 2605.11739 (which uses 50 prompts and one sample each).

    Needs reference answers. It is coarse: on 50 prompts it moves in steps of 0.02, so that neighbouring candidates
    often tie and an accepted tie can do harm; `TeacherKL` is finer and needs no answers.

    Args:
        num_prompts: Training prompts, chosen once from the seed; `data.num_reserved` keeps them out of training.
        num_samples: Answers per prompt.

    Raises:
        ValueError: A number is below 1; when fit starts also when there are fewer training prompts.
    """

    @override
    def check(self, trainer: Any, module: OPDModule) -> None:
        super().check(trainer, module)
        if not all(map(module.data.task.can_grade, self.choose_problems(trainer))):
            found = "some problems without" if module.data.task.is_graded else "no"
            name = type(module.data.task).__name__
            raise ValueError(f"score: TaskAccuracy needs marks, but {name} has {found} answers. Use TeacherKL.")

    @override
    def sum_and_count(self, trainer: Any, module: OPDModule) -> tuple[float, float]:
        rollouts = self.answer_prompts(trainer, module).rollouts
        return sum(rollout.reward for rollout in rollouts), len(rollouts)


class TeacherKL(_OnFreshRollouts):
    """Negative reverse KL to the teacher, per token in nats, on fresh answers to n training prompts. Needs no labels.

    Args:
        num_prompts: Training prompts, chosen once from the seed; `data.num_reserved` keeps them out of training.
        num_samples: Answers per prompt.

    Raises:
        ValueError: A number is below 1; when fit starts also when there are fewer training prompts.
    """

    @override
    def check(self, trainer: Any, module: OPDModule) -> None:
        super().check(trainer, module)
        divergence_to_measure(module)

    @override
    def sum_and_count(self, trainer: Any, module: OPDModule) -> tuple[float, float]:
        total, count = divergence_from_teacher(module, self.answers_for_teacher(trainer, module))
        return -total, count

    def answers_for_teacher(self, trainer: Any, module: OPDModule) -> Sequence[Rollout]:
        """New answers, with what the teacher is shown beside them."""
        return module.give_context(self.answer_prompts(trainer, module).rollouts, self.num_samples)


class TeacherKLOnNewRollouts(TeacherKL):
    """As `TeacherKL`, with all candidates of a search on one set of answers: those of the weights it starts from.

    Each search generates once, with new random numbers, and asks the teacher once: candidates cost a student pass each.
    Made for the end of a round of reused rollouts (`schedule: rounds`), whose states are older than the weights.

    Args:
        num_prompts: Training prompts, chosen once from the seed; `data.num_reserved` keeps them out of training.
        num_samples: Answers per prompt.

    Raises:
        ValueError: A number is below 1; when fit starts also when there are fewer training prompts.
    """

    def __init__(self, num_prompts: int = 32, num_samples: int = 1) -> None:
        super().__init__(num_prompts, num_samples)
        self._rollouts: Sequence[Rollout] | None = None
        self._kept: KeptScores | None = None

    @override
    def begin(self, trainer: Any, module: OPDModule) -> None:
        assert module.teacher is not None
        self._rollouts, self._kept = None, KeptScores(module.teacher)

    @override
    def seed_parts(self, trainer: Any) -> tuple[int | str, ...]:
        return (*super().seed_parts(trainer), trainer.global_step)

    @override
    def sum_and_count(self, trainer: Any, module: OPDModule) -> tuple[float, float]:
        assert self._kept is not None, "begin comes first"
        if self._rollouts is None:
            self._rollouts = self.answers_for_teacher(trainer, module)
            request, batches = divergence_to_measure(module).request(), module.make_micro_batches(self._rollouts)
            if request is not None:
                self._kept.score_round(trainer.global_step, batches, request, max_bytes=sys.maxsize)
        total, count = divergence_from_teacher(module, self._rollouts, self._kept)
        return -total, count


class TeacherKLOnFixedRollouts(_MeanOverProcesses):
    """Negative reverse KL to the teacher, per token in nats, on rollouts of the step just trained. Generates nothing.

    The cheapest score: one teacher and one student pass per candidate. The rollouts come from the weights before the
    step (one step earlier still with `OneStepAhead`), so it does not see where a candidate would go that leaves
    their states.

    Args:
        num_rollouts: Rollouts used, over all processes, of those that were trained on; None takes all of them.

    Raises:
        ValueError: The number is below 1.
    """

    def __init__(self, num_rollouts: int | None = None) -> None:
        if num_rollouts is not None and num_rollouts < 1:
            raise ValueError(f"TeacherKLOnFixedRollouts.num_rollouts: expected at least 1 or null, got {num_rollouts}.")
        self.num_rollouts = num_rollouts

    @override
    def check(self, trainer: Any, module: OPDModule) -> None:
        super().check(trainer, module)
        divergence_to_measure(module)

    @override
    def sum_and_count(self, trainer: Any, module: OPDModule) -> tuple[float, float]:
        told = module.give_context(module.last_rollouts)  # before the cut: a teacher may read whole groups
        rollouts = [rollout for rollout in told if rollout.num_trained]
        if self.num_rollouts is not None:
            rollouts = rollouts[: -(-self.num_rollouts // trainer.world_size)]
        total, count = divergence_from_teacher(module, rollouts)
        return -total, count


def divergence_to_measure(module: OPDModule) -> Objective:
    """The reverse KL, or the run's own objective where the teacher cannot give its whole vocabulary.

    Raises:
        ValueError: There is no teacher, or the value of that objective means nothing.
    """
    teacher, objective = module.teacher, module.objective
    if teacher is None:
        raise ValueError("score: it measures the divergence from the teacher, but model.teacher is not set.")
    if teacher.offer.full_vocabulary:
        return DivergenceObjective(
            student_temperature=objective.student_temperature,
            teacher_temperature=getattr(objective, "teacher_temperature", 1.0),
            chunk_tokens=objective.chunk_tokens,
        )
    if not objective.value_is_divergence:
        raise ValueError(
            f"score: this teacher does not give its whole vocabulary, and the value of {type(objective).__name__} is no"
            " divergence. Use TaskAccuracy, or a DivergenceObjective with estimator Direct."
        )
    return objective


def divergence_from_teacher(
    module: OPDModule, rollouts: Sequence[Rollout], teacher: Teacher | None = None
) -> tuple[float, int]:
    """Sum of `divergence_to_measure` over the response tokens of the rollouts, in nats, and their number.

    Args:
        module: Student and teacher.
        rollouts: On which states, with what the teacher is shown (`OPDModule.give_context`).
        teacher: Who else has the teacher's scores of them; None asks the teacher itself.
    """
    objective = divergence_to_measure(module)
    total, count = 0.0, 0
    for compared in module.compare(module.make_micro_batches(rollouts), objective, objective.request(), teacher):
        total += float(compared.losses.sum())
        count += compared.micro_batch.num_tokens
    return total, count
