"""`Routed`: which teacher scores an answer is written in its problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Problem, Rollout, ScoreRequest, Student, Teacher, TeacherScores
from opd_lightning.interfaces.columns import MISSING, look_up
from opd_lightning.rollouts.batching import collate
from opd_lightning.teachers.joined_scores import JoinedScores
from opd_lightning.teachers.several import SeveralTeachers

_Cut = dict[str, tuple[torch.Tensor, MicroBatch]]


class Routed(SeveralTeachers):
    """Several teachers, each for its own problems: a column of the problem says which (its domain, its level, ...).

    Args:
        teachers: By name.
        column: Column of the problem, by dotted path; "source" is the problem's source, if no column has that name.
        routes: Name of a teacher for each value of the column, as text; None: the values are the names.
        default: Name of the teacher of all other problems; None refuses them.
        paged: Whether the teachers take turns on the device (`SeveralTeachers`).

    Raises:
        ValueError: A route leads to no teacher.
    """

    def __init__(
        self,
        teachers: dict[str, Teacher],
        column: str,
        routes: Mapping[str, str] | None = None,
        default: str | None = None,
        paged: bool = False,
    ) -> None:
        super().__init__(teachers, paged)
        self.column = column
        self.routes = None if routes is None else {str(value): name for value, name in routes.items()}
        self.default = default
        self._pad_id = 0
        named = {f"routes.{value}": name for value, name in (self.routes or {}).items()}
        for setting, name in (named | ({} if default is None else {"default": default})).items():
            if name not in teachers:
                raise ValueError(
                    f"model.teacher.{setting}: expected the name of a teacher ({', '.join(teachers)}), got {name!r}."
                )

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        super().setup(student, model, device)
        self._pad_id = student.tokenizer.pad_id

    def route(self, problem: Problem) -> str:
        """Name of the teacher of a problem.

        Raises:
            ValueError: No route leads from its column.
        """
        value = look_up({"source": problem.source, **problem.columns}, self.column)
        names = dict.fromkeys(self.teachers) if self.routes is None else self.routes
        if str(value) in names and value is not MISSING:
            return str(value) if self.routes is None else self.routes[str(value)]
        if self.default is not None:
            return self.default
        columns = ", ".join(["source", *problem.columns])
        found = f"{value!r} in the column" if value is not MISSING else f"the columns {columns}, but no column"
        raise ValueError(
            f"model.teacher.routes: problem {problem.uid!r} has {found} {self.column!r}, and there is no route for"
            f" that. Routes: {', '.join(map(repr, names))}. Add one, or name a teacher for all others in"
            " model.teacher.default."
        )

    @override
    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Have each teacher check its own problems; all must have one."""
        own: dict[str, list[Problem]] = {name: [] for name in self.teachers}
        for problem in problems:
            own[self.route(problem)].append(problem)
        for name, teacher in self.teachers.items():
            teacher.check_problems(own[name])

    @override
    def asked(self, rollout: Rollout) -> Iterator[Teacher]:
        yield self.teachers[self.route(rollout.problem)]

    @override
    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        cuts = [self._cut(batch) for batch in batches]
        scores = {
            name: teacher.score_all([cut[name][1] for cut in cuts if name in cut], request)
            for name, teacher in self.teachers.items()
        }
        return self._joined(batches, cuts, {name: iter(each) for name, each in scores.items()})

    def _joined(
        self, batches: Sequence[MicroBatch], cuts: Sequence[_Cut], streams: Mapping[str, Iterator[TeacherScores]]
    ) -> Iterator[TeacherScores]:
        for batch, cut in zip(batches, cuts, strict=True):
            parts = [(cut[name][0], next(streams[name])) for name in self.teachers if name in cut]
            yield parts[0][1] if len(parts) == 1 else JoinedScores(batch.tokens.ids, parts)

    def _cut(self, batch: MicroBatch) -> _Cut:
        """Of each teacher that has any: the places of its tokens, and a micro-batch of its rollouts."""
        names = [self.route(rollout.problem) for rollout in batch.rollouts]
        if len(set(names)) == 1:
            return {names[0]: (torch.arange(batch.num_tokens), batch)}
        lengths = torch.tensor([rollout.num_trained for rollout in batch.rollouts])
        owner = torch.arange(len(names)).repeat_interleave(lengths)
        found = {}
        for name in self.teachers:
            rows = [row for row, other in enumerate(names) if other == name]
            if rows:
                places = torch.isin(owner, torch.tensor(rows)).nonzero().squeeze(-1)
                part = collate([batch.rollouts[row] for row in rows], self._pad_id)
                found[name] = (places, part.to(batch.input_ids.device))
        return found
