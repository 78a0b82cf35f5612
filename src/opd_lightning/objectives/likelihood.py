"""Negative log-likelihood: imitation of texts that somebody else wrote."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives.student_scores import ScoreObjective, StudentScores


class NLL(ScoreObjective):
    """-log p(y) of every response token, in nats: supervised fine-tuning on what the rollout source gives.

    Needs no teacher. For responses that a teacher or a person wrote; on the student's own rollouts its gradient is 0 in
    expectation.

    Args:
        chunk_tokens: Response tokens whose logits exist at once.

    Raises:
        ValueError: The number is below 1.
    """

    def __init__(self, chunk_tokens: int = 512) -> None:
        check_at_least(1, "objective", chunk_tokens=chunk_tokens)
        self.chunk_tokens = chunk_tokens

    @override
    def request(self) -> None:
        return None

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        return -student.at(tokens.ids[:, None]).squeeze(-1)
