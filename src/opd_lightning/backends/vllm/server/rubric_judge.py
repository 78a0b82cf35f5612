"""`RubricJudge`: a model behind OpenAI's chat interface writes criteria for a group of answers and marks them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from typing_extensions import override

from opd_lightning.backends.vllm.server.client import Connection, ServerPool
from opd_lightning.backends.vllm.server.kept_replies import KeptReplies, Question
from opd_lightning.backends.vllm.server.rubric_replies import read_marks, read_rubric
from opd_lightning.interfaces import Rollout
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.methods import Judge
from opd_lightning.methods.ropd import rubric_score

_RUBRIC = """Problem:
{problem}

Answers of a strong model:
{references}

Answers of students:
{answers}

Write up to {num_criteria} criteria that tell good answers to this problem from poor ones. Each must be decidable for \
one answer alone, by yes or no, and has a weight from 1 to 10. Reply with JSON only:
{{"criteria": [{{"text": "...", "weight": 5}}]}}"""
_MARKS = """Problem:
{problem}

Criteria:
{criteria}

Answer:
{answer}

Does the answer meet each of the {num_criteria} criteria? Reply with JSON only, 1 for yes and 0 for no, in their order:
{{"marks": [1, 0]}}"""


class RubricJudge(Judge):
    """Asks a model for answers of its own, for weighted criteria that it makes of them and of the group's, and marks.

    Every reply is kept in a file under a hash of its question, and no question is asked twice: a resumed run gets the
    same marks, and a run that is given again costs nothing. A reply that does not fit is asked for again with another
    seed, `num_attempts` times in all; then the run stops with one line. Remove the folder to ask anew.

    The questions' wording is ours, as none is published; it is in this module.

    Args:
        connection: Where the servers are, and how patient to be.
        model: Name under which it is served.
        cache: Folder for replies; made if it does not exist.
        num_references: Answers of its own that it compares with.
        max_criteria: Most criteria of a rubric.
        reuse_rubrics: Write a problem's rubric for the first group of its answers, and mark later ones by it too.
        max_tokens: Longest reply.
        num_attempts: Most times that a question is asked.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2605.07396 and the authors' code.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        cache: str = "rubrics",
        num_references: int = 1,
        max_criteria: int = 8,
        reuse_rubrics: bool = False,
        max_tokens: int = 2048,
        num_attempts: int = 3,
    ) -> None:
        check_at_least(1, "judge", max_criteria=max_criteria, max_tokens=max_tokens, num_attempts=num_attempts)
        check_at_least(0, "judge", num_references=num_references)
        self.connection = connection
        self.model = model
        self.cache = cache
        self.num_references = num_references
        self.max_criteria = max_criteria
        self.reuse_rubrics = reuse_rubrics
        self.max_tokens = max_tokens
        self.num_attempts = num_attempts

    @override
    def scores(self, groups: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        with closing(ServerPool(self.connection, "judge")) as pool:
            references = iter(self._ask(pool, [each for group in groups for each in self._references(group)]))
            written = [[next(references) for _ in range(self.num_references)] for _ in groups]
            rubrics = self._ask(pool, list(map(self._criteria, groups, written)))
            pairs = list(zip(groups, rubrics, strict=True))
            marks = iter(self._ask(pool, [self._verdict(each, rubric) for group, rubric in pairs for each in group]))
        return [[rubric_score([weight for _, weight in rubric], next(marks)) for _ in group] for group, rubric in pairs]

    def _ask(self, pool: ServerPool, questions: Sequence[Question]) -> list[Any]:
        return KeptReplies(self.cache, self.model, self.max_tokens, self.num_attempts).ask(pool, questions)

    def _references(self, group: Sequence[Rollout]) -> list[Question]:
        return [Question(_chat(group[0]), str.strip, seed=seed) for seed in range(self.num_references)]

    def _criteria(self, group: Sequence[Rollout], references: Sequence[str]) -> Question:
        text = _RUBRIC.format(
            problem=_problem(group[0]),
            references=_numbered(references) or "(none)",
            answers=_numbered([rollout.text for rollout in group]),
            num_criteria=self.max_criteria,
        )
        name = ("rubric", self.max_criteria, _chat(group[0])) if self.reuse_rubrics else None
        return Question(_said(text), lambda reply: read_rubric(reply, self.max_criteria), name=name)

    def _verdict(self, rollout: Rollout, rubric: Sequence[tuple[str, float]]) -> Question:
        text = _MARKS.format(
            problem=_problem(rollout),
            criteria=_numbered([text for text, _ in rubric]),
            answer=rollout.text,
            num_criteria=len(rubric),
        )
        return Question(_said(text), lambda reply: read_marks(reply, len(rubric)))


def _chat(rollout: Rollout) -> list[dict[str, str]]:
    """The problem as a chat; a raw prompt is what the user says."""
    return [
        {"role": "user" if message["role"] == "raw" else message["role"], "content": message["content"]}
        for message in rollout.problem.messages
    ]


def _problem(rollout: Rollout) -> str:
    return "\n\n".join(message["content"] for message in rollout.problem.messages)


def _numbered(texts: Sequence[str]) -> str:
    return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1))


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
