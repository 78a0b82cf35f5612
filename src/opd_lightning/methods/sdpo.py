"""SDPO: the student learns from itself, told what succeeded beside its own attempt (arXiv 2601.20802)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import (
    MicroBatch,
    Normalizer,
    Problem,
    ResponseTokens,
    Rollout,
    Teacher,
    TeacherScores,
    TokenWeighting,
)
from opd_lightning.objectives import (
    Direct,
    Divergence,
    DivergenceObjective,
    Estimator,
    JensenShannon,
    StudentTopK,
    Support,
)
from opd_lightning.objectives.sampled_token import LARGEST_LOG_IMPORTANCE
from opd_lightning.objectives.student_scores import StudentScores
from opd_lightning.teachers import PrivilegedTeacher

DEMONSTRATION = "demonstration"


class PeerTeacher(PrivilegedTeacher):
    """A teacher that is shown a successful answer of another attempt at the same problem, and what became of this one.

    Shown is the first successful answer to the prompt; where that is the attempt itself, the next one instead, unless
    `own_success` allows it. Answers for which there is nothing to show are read as they are:
    `DemonstratedOnly` leaves them out of the loss.

    Args:
        teacher: Who scores; `MovingAverageTeacher` in the paper.
        template: As in `PrivilegedTeacher`; ``{demonstration}`` stands for what is shown.
        solution: How a successful answer is shown, as ``{solution}``.
        feedback: How a failed attempt is told what was wrong with it: ``{response}`` is the attempt, ``{reward}`` its
            mark, other names in braces are columns of the problem; null says nothing.
        success: Least reward of a success.
        own_success: Whether a successful attempt may be shown itself.

    Raises:
        ValueError: The template shows no demonstration.
    """

    def __init__(
        self,
        teacher: Teacher,
        template: str = "{question}\n\n{demonstration}\n\nNow give a correct answer to the question.",
        solution: str = "A correct answer:\n\n{solution}",
        feedback: str | None = None,
        success: float = 1.0,
        own_success: bool = True,
    ) -> None:
        super().__init__(teacher, template, missing="plain")
        for name, text, wanted in (("template", template, DEMONSTRATION), ("solution", solution, "solution")):
            if f"{{{wanted}}}" not in text:
                raise ValueError(f"model.teacher.{name}: expected {{{wanted}}} somewhere in it, got {text!r}.")
        self.solution = solution
        self.feedback = feedback
        self.success = success
        self.own_success = own_success

    @override
    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Every problem must have the columns that the feedback names."""
        self.teacher.check_problems(problems)
        for problem in problems if self.feedback is not None else ():
            if self.fill(self.feedback or "", problem, {"response": "", "reward": ""}) is None:
                raise ValueError(
                    f"model.teacher.feedback: problem {problem.uid!r} lacks a column that it names. It has"
                    f" {', '.join(problem.columns)}; {{response}} and {{reward}} are known of every answer."
                )

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        """Attach what is shown.

        Raises:
            ValueError: No answer is marked, or each prompt has only one.
        """
        groups = super().shape(groups)
        rollouts = [rollout for group in groups for rollout in group]
        if rollouts and all(math.isnan(rollout.reward) for rollout in rollouts):
            raise ValueError(
                "model.teacher: PeerTeacher shows successful answers, and the task marks none. Use a task that does, or"
                " PrivilegedTeacher with a column."
            )
        if self.feedback is None and all(len(group) == 1 for group in groups) and rollouts:
            raise ValueError(
                "data.rollouts_per_prompt: PeerTeacher shows one answer to the others of its prompt, and there is one"
                " only. Set it to 2 or more (the paper takes 8), and num_samples of a score of EffOPD that answers anew"
                " too, or set model.teacher.feedback."
            )
        return [[self._shown(rollout, group) for rollout in group] for group in groups]

    def _shown(self, rollout: Rollout, group: Sequence[Rollout]) -> Rollout:
        successes = [other for other in group if other.reward >= self.success]
        shown = successes if self.own_success else [other for other in successes if other is not rollout]
        parts = [self.solution.replace("{solution}", shown[0].text)] if shown else []
        if self.feedback is not None and rollout.reward < self.success:
            told = {"response": rollout.text, "reward": f"{rollout.reward:g}"}
            parts.append(self.fill(self.feedback, rollout.problem, told) or "")
        return replace(rollout, context={**rollout.context, DEMONSTRATION: "\n\n".join(parts)}) if parts else rollout


class DemonstratedOnly(TokenWeighting):
    """Weight 1 for tokens of answers that a `PeerTeacher` had something to show for, 0 for all others.

    Args:
        normalizer: What the sum of a step is divided by: the tokens that count ("kept_tokens", as in the authors'
            code), "all_tokens", or "sequences".
    """

    def __init__(self, normalizer: Normalizer = "kept_tokens") -> None:
        self.normalizer = normalizer

    @override
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        shown = torch.tensor([float(DEMONSTRATION in rollout.context) for rollout in micro_batch.rollouts])
        return shown.to(micro_batch.rows.device)[micro_batch.rows]


class SDPOObjective(DivergenceObjective):
    """A divergence, each token's times min(p / p_rollout, cap), without gradient.

    By default the Jensen-Shannon divergence on the student's 100 likeliest tokens and one bucket for all others.

    Args:
        support: As in `DivergenceObjective`.
        divergence: As there; JensenShannon(1) is the reverse, JensenShannon(0) the forward KL.
        estimator: As there.
        importance_cap: Largest ratio; null multiplies by nothing.
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        teacher_temperature: Divides the teacher's logits.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution.
        chunk_tokens: Response tokens whose logits exist at once.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        support: Support = StudentTopK(100, "tail"),  # noqa: B008 - it has no state, and --print_config shows it
        divergence: Divergence = JensenShannon(0.5),  # noqa: B008
        estimator: Estimator = Direct(),  # noqa: B008
        importance_cap: float | None = 2.0,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
    ) -> None:
        super().__init__(
            support,
            divergence,
            estimator,
            student_temperature,
            teacher_temperature,
            allow_biased_sampling,
            chunk_tokens,
        )
        if importance_cap is not None and not 1 <= importance_cap < math.inf:
            raise ValueError(
                f"objective.importance_cap: expected a finite number of at least 1, or null, got {importance_cap}."
            )
        self.importance_cap = importance_cap
        self.needs_rollout_log_probs = importance_cap is not None

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        losses = super().losses_from(student, teacher, tokens)
        if self.importance_cap is None:
            return losses
        log_probs = student.at(tokens.ids[:, None]).squeeze(-1).detach()
        log_ratio = log_probs - tokens.rollout_log_probs.to(log_probs)
        bound = LARGEST_LOG_IMPORTANCE
        return losses * log_ratio.clamp(-bound, bound).exp().clamp(max=self.importance_cap)
