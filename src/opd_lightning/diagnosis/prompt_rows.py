"""What was measured on each prompt, one row per prompt: the numbers that prompts are chosen by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opd_lightning.diagnosis.pair import Pair
from opd_lightning.interfaces import Prompt, Rollout, TrainedRollout
from opd_lightning.tasks.scored import question_digest

PROMPT_NUMBERS = {  # in words, in the order of the columns
    "student_accuracy": "student's accuracy",
    "teacher_accuracy": "teacher's accuracy",
    "teacher_gain": "teacher's accuracy less the student's",
    "overlap_ratio": "overlap ratio",
    "overlap_mass_student": "student's mass on the overlap",
    "overlap_mass_teacher": "teacher's mass on the overlap",
    "reverse_kl": "reverse KL (student to teacher)",
    "student_entropy": "student's entropy",
    "teacher_entropy": "teacher's entropy",
    "teacher_log_prob": "teacher's log-likelihood of the student's tokens",
    "response_length": "response tokens",
    "truncation_rate": "cut at max_new_tokens",
}
_FACTS = (
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
)

PromptRow = dict[str, Any]


def measure_prompts(pair: Pair, prompts: Sequence[Prompt]) -> list[PromptRow]:
    """Have student and teacher answer prompts, compare them on the student's answers, and say what each prompt showed.

    Args:
        pair: Loaded.
        prompts: As many seeds each as answers are wanted.
    """
    groups = pair.answer(prompts)
    rollouts = [rollout for group in groups for rollout in group]
    compared = pair.compare(pair.shape(rollouts, len(groups[0])))
    teacher = pair.answer_as_teacher(prompts) if pair.speaker is not None else None
    return prompt_rows(groups, compared, teacher, draws_as_compared=pair.draws_as_compared)


def prompt_rows(
    groups: Sequence[Sequence[Rollout]],
    compared: Sequence[TrainedRollout],
    teacher: Sequence[Sequence[Rollout]] | None,
    *,
    draws_as_compared: bool,
) -> list[PromptRow]:
    """One row per prompt; None where a number is not known.

    Args:
        groups: Answers of the student, those of a prompt together.
        compared: The same answers in the same order, token by token.
        teacher: Answers of the teacher, grouped likewise; None where it gave none.
        draws_as_compared: Whether both are of one temperature (`Pair.draws_as_compared`).
    """
    rows = []
    left = iter(compared)
    for place, group in enumerate(groups):
        own = [next(left) for _ in group]
        problem = group[0].problem
        accuracy = _mean([rollout.reward for rollout in group])
        theirs = None if teacher is None else _mean([rollout.reward for rollout in teacher[place]])
        rows.append(
            {
                "uid": problem.uid,
                "source": problem.source,
                "question": question_digest(problem),
                "num_answers": len(group),
                "student_accuracy": accuracy,
                "teacher_accuracy": theirs,
                "teacher_gain": None if accuracy is None or theirs is None else theirs - accuracy,
                **{name: _mean(_values(own, name), skip_unknown=True) for name in _FACTS},
                "teacher_log_prob": _mean(_teacher_log_probs(own), skip_unknown=True) if draws_as_compared else None,
                "response_length": _mean([float(len(rollout.response_ids)) for rollout in group]),
                "truncation_rate": _mean([float(not rollout.finished) for rollout in group]),
            }
        )
    return rows


def _values(compared: Sequence[TrainedRollout], name: str) -> list[float]:
    return [value for each in compared if name in each.facts for value in each.facts[name].tolist()]


def _teacher_log_probs(compared: Sequence[TrainedRollout]) -> list[float]:
    """The teacher's log q(y_t): log p(y_t) as it was drawn with, less log p(y_t) - log q(y_t)."""
    values: list[float] = []
    for each in compared:
        if "sampled_log_ratio" in each.facts:
            drawn_with = each.rollout.log_probs[each.rollout.trained_positions]
            values += (drawn_with.double() - each.facts["sampled_log_ratio"].double()).tolist()
    return values


def _mean(values: Sequence[float], *, skip_unknown: bool = False) -> float | None:
    """The mean; None where there is nothing, or (unless they are skipped) where a value is not known."""
    known = [value for value in values if not math.isnan(value)]
    if not known or (len(known) < len(values) and not skip_unknown):
        return None
    return math.fsum(known) / len(known)
