"""`PrivilegedTeacher`: a teacher that reads more than the student, a reference solution for example."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from typing_extensions import override

from opd_lightning.interfaces import (
    Message,
    MicroBatch,
    Problem,
    Rollout,
    ScoreRequest,
    Student,
    Teacher,
    TeacherScores,
)
from opd_lightning.interfaces.columns import MISSING, look_up
from opd_lightning.rollouts.batching import collate

Missing = Literal["refuse", "plain"]

_NAME = re.compile(r"\{(\w[\w.]*)\}")


class PrivilegedTeacher(Teacher):
    """Any teacher, with more in its prompt than the student's: the student learns to do without.

    The last message of the problem is replaced by the template, and the conversation rendered anew by the student's
    tokenizer. The student's own answer follows, token for token, and only its tokens are scored: none of the prompt.

    Args:
        teacher: Who scores.
        template: Text of the message. ``{question}`` stands for what the student was asked, ``{answer}`` for the
            reference answer, any other name in braces for that column of the problem, by dotted path.
        missing: What becomes of a problem that lacks a column: "refuse" stops before training, "plain" has the teacher
            read what the student reads.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(self, teacher: Teacher, template: str, missing: Missing = "refuse") -> None:
        if not _NAME.search(template):
            raise ValueError(
                "model.teacher.template: expected names in braces, such as {question} and {answer}, got"
                f" {template!r}."
            )
        if missing not in get_args(Missing):
            raise ValueError(f"model.teacher.missing: expected one of {', '.join(get_args(Missing))}, got {missing!r}.")
        self.teacher = teacher
        self.template = template
        self.missing = missing
        self._student: Student | None = None

    @property
    @override
    def changes(self) -> bool:  # type: ignore[override]
        return self.teacher.changes

    @property
    @override
    def offer(self) -> ScoreRequest:
        return self.teacher.offer

    @property
    @override
    def context_length(self) -> int | None:
        return self.teacher.context_length

    @override
    def check(self, request: ScoreRequest) -> None:
        self.teacher.check(request)

    @override
    def preflight(self, student: Student) -> None:
        self._student = student
        self.teacher.preflight(student)

    @override
    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Every problem must have what the template names, or one of them at least, where `missing` is "plain"."""
        self.teacher.check_problems(problems)
        told = [self.message(problem, {}) is not None for problem in problems]
        if told and not any(told):
            warnings.warn(
                f"model.teacher.template: no problem has all of {', '.join(self.names)}, so the teacher reads what the"
                " student reads.",
                stacklevel=2,
            )

    @override
    def page(self) -> None:
        self.teacher.page()

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        self._student = student
        self.teacher.setup(student, model, device)

    @override
    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        return self.teacher.shape(groups)

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        return self.teacher.score(self.with_context(batch), request)

    @override
    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        return self.teacher.score_all([self.with_context(batch) for batch in batches], request)

    @override
    def follow(self) -> None:
        self.teacher.follow()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.teacher.state_dict()

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.teacher.load_state_dict(state)

    @override
    def close(self) -> None:
        self.teacher.close()

    @property
    def names(self) -> list[str]:
        """Names in the template, once each."""
        return list(dict.fromkeys(_NAME.findall(self.template)))

    def message(self, problem: Problem, context: Mapping[str, str]) -> str | None:
        """The teacher's last message for a problem; None where it reads the student's.

        Raises:
            ValueError: What the template names is not there, and `missing` refuses that.
        """
        return self.fill(self.template, problem, context)

    def fill(self, text: str, problem: Problem, context: Mapping[str, str]) -> str | None:
        """A text with what its names stand for: of the problem, or of the context; None where that is missing.

        Raises:
            ValueError: It is missing, and `missing` refuses that.
        """
        row = {"answer": problem.answer, **problem.columns, **context, "question": _question(problem)["content"]}
        values: dict[str, str] = {}
        for name in _NAME.findall(text):
            value = look_up(row, name)
            if value is MISSING or value is None:
                if self.missing == "plain":
                    return None
                raise ValueError(
                    f"model.teacher.template: problem {problem.uid!r} has nothing to put for {{{name}}}. It has"
                    f" {', '.join(name for name, value in row.items() if value is not None)}. Name one of these, or"
                    " set model.teacher.missing: plain."
                )
            values[name] = str(value)
        return _NAME.sub(lambda found: values[found[1]], text)

    def with_context(self, batch: MicroBatch) -> MicroBatch:
        """The same responses in the same order, behind the teacher's own prompts."""
        assert self._student is not None, "call setup before score"
        rollouts = [self._told(rollout) for rollout in batch.rollouts]
        if all(mine is other for mine, other in zip(rollouts, batch.rollouts, strict=True)):
            return batch
        return collate(rollouts, self._student.tokenizer.pad_id).to(batch.input_ids.device)

    def _told(self, rollout: Rollout) -> Rollout:
        assert self._student is not None
        problem, limit = rollout.problem, self.teacher.context_length
        text = self.message(problem, rollout.context)
        if text is None:
            return rollout
        last: Message = {**_question(problem), "content": text}
        prompt_ids = torch.tensor(self._student.tokenizer.render([*problem.messages[:-1], last]))
        length = len(prompt_ids) + len(rollout.response_ids)
        if limit is not None and length > limit:
            raise ValueError(
                f"model.teacher.template: with it the prompt of problem {problem.uid!r} has {len(prompt_ids)} tokens,"
                f" and with its answer {length}; the teacher reads {limit}. Lower data.sampling.max_new_tokens, or"
                " leave problems with long columns out (the task's where)."
            )
        return replace(rollout, prompt_ids=prompt_ids)


def _question(problem: Problem) -> Message:
    return problem.messages[-1]
