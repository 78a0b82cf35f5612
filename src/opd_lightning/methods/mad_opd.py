"""MAD-OPD: teachers that have debated, each with its say (arXiv 2605.01347)."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, Sampling, ScoreRequest, TeacherScores
from opd_lightning.objectives import DivergenceObjective, JensenShannon
from opd_lightning.objectives.student_scores import ScoreObjective, StudentScores


class MeanOverTeachers(ScoreObjective):
    """The loss against each teacher of a `MixtureTeacher`, averaged by their weights: sum_k w_k D(p, q_k).

    With one teacher, or another kind of teacher, it is the loss itself. For two divergences the mixture alone has the
    same gradient (see `MixtureTeacher`); for others, as the Jensen-Shannon divergence, only this has.

    Args:
        objective: The loss against one teacher; null is the Jensen-Shannon divergence over the whole vocabulary.
    """

    reads_members = True

    def __init__(self, objective: DivergenceObjective | None = None) -> None:
        self.objective = objective if objective is not None else DivergenceObjective(divergence=JensenShannon(0.5))
        self.student_temperature = self.objective.student_temperature
        self.chunk_tokens = self.objective.chunk_tokens
        self.value_is_divergence = self.objective.value_is_divergence
        self.needs_rollout_log_probs = self.objective.needs_rollout_log_probs

    @override
    def request(self) -> ScoreRequest | None:
        return self.objective.request()

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        self.objective.check_sampling(sampling)

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        each = [(weights, self.objective.losses_from(student, scores, tokens)) for weights, scores in teacher.members()]
        if len(each) == 1:
            return each[0][1]
        total = each[0][0].to(each[0][1]) * each[0][1]
        for weights, losses in each[1:]:
            total = total + weights.to(losses) * losses
        return total
