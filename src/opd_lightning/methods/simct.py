"""SimCT: distillation across tokenizers on the shortest text that both can end on (arXiv 2605.07711)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Objective, ResponseTokens, Sampling, ScoreRequest, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import JointScores
from opd_lightning.objectives.arguments import check_temperatures, check_whole_distribution
from opd_lightning.objectives.joint_scores import Averaged, sums_of_runs
from opd_lightning.objectives.logprobs import LOG_ZERO, full_log_probs, temper


class SimCT(Objective):
    """Reverse KL between the two models' scores on joint units, for a teacher with another tokenizer.

    A unit is the shortest text at whose ends both tokenizations have a boundary; a loss stands where one begins. There
    each model scores the tokens that both vocabularies have, and the unit itself by the mean over its own tokens; both
    lists are put through a softmax and compared. That is a score, not the probability of the text.

    The loss stands at a unit's first token. The gradient of its further tokens is theirs alone, as the seam asks: their
    losses are 0 in value and carry it. With one tokenizer for both this is the reverse KL of the whole vocabulary.

    Args:
        averaged: Over a unit's tokens: "log_probs" as in the paper, or raw "logits" as in the authors' code.
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        teacher_temperature: Divides the teacher's logits.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution at
            `student_temperature` (the paper samples at top-p 0.95).
        chunk_tokens: Response tokens whose logits exist at once.
        least_teacher_mass: A unit has no loss where the teacher gives the shared tokens and the unit together less
            than this: put through a softmax, little would look like all. The unit counts with the mean of its tokens'
            log-probabilities. 0 leaves none out; 0.5 is the default of later code.

    Raises:
        ValueError: A setting is none of these.

    Source: arXiv 2605.07711, Eqs. 6 to 9, and the authors' code.
    """

    value_is_divergence = True

    def __init__(
        self,
        averaged: Averaged = "log_probs",
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
        least_teacher_mass: float = 0.0,
    ) -> None:
        if not 0 <= least_teacher_mass < 1:
            raise ValueError(
                "objective.least_teacher_mass: expected a mass in [0, 1) (0 leaves no unit out), got"
                f" {least_teacher_mass}."
            )
        if averaged not in get_args(Averaged):
            raise ValueError(f"objective.averaged: expected one of {', '.join(get_args(Averaged))}, got {averaged!r}.")
        check_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        check_at_least(1, "objective", chunk_tokens=chunk_tokens)
        self.averaged: Averaged = averaged
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.allow_biased_sampling = allow_biased_sampling
        self.chunk_tokens = chunk_tokens
        self.least_teacher_mass = least_teacher_mass

    @override
    def request(self) -> ScoreRequest:
        return ScoreRequest(joint_units=True, temperature=self.teacher_temperature)

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        check_whole_distribution(sampling, self.student_temperature, self.allow_biased_sampling)

    @override
    def token_losses(self, student_logits: Tensor, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert isinstance(teacher, JointScores), "only such a teacher offers `joint_units`"
        units, shared = teacher.units, teacher.shared
        starts, lengths = units.starts, units.num_tokens[units.starts]
        scores = (
            full_log_probs(student_logits, self.student_temperature)
            if self.averaged == "log_probs"
            else temper(student_logits, self.student_temperature)
        )
        written = scores.gather(-1, tokens.ids[:, None]).squeeze(-1)
        fixed = written.detach()
        # the first token's own score moves, those of the others stand
        own = (sums_of_runs(fixed, starts, lengths) + written[starts] - fixed[starts]) / lengths
        is_shared = units.column[starts] >= 0
        log_p = _normalized(scores[starts[:, None], shared.student_ids], own, is_shared)
        with torch.no_grad():
            theirs = teacher.at_units(self.averaged).to(log_p)
            log_q = _normalized(theirs[:, :-1], theirs[:, -1], is_shared)
        values = (log_p.exp() * (log_p - log_q)).sum(-1)
        if self.least_teacher_mass:
            log_p, log_q, values = self._without_the_unknown(teacher, is_shared, log_p, log_q, values)
        with torch.no_grad():  # the gradient in the unit's score, which its other tokens have a part in
            pull = log_p[:, -1].exp() * (log_p[:, -1] - log_q[:, -1] - values) / lengths
            owner = (units.num_tokens > 0).long().cumsum(0) - 1
            pulls = torch.where(units.joined, pull[owner.clamp(min=0)] if len(pull) else 0.0, 0.0)
        return pulls * (written - fixed) + torch.zeros_like(fixed).scatter(0, starts, values)

    def _without_the_unknown(
        self, teacher: JointScores, is_shared: Tensor, log_p: Tensor, log_q: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, with equal models and no loss at units of which the teacher's candidates hold too little mass."""
        with torch.no_grad():
            masses = teacher.at_units("log_probs").exp()
            mass = masses[:, :-1].sum(-1) + torch.where(is_shared, 0.0, masses[:, -1])
            is_known = mass >= self.least_teacher_mass
            log_q = torch.where(is_known[:, None], log_q, log_p)
        return log_p, log_q, torch.where(is_known, values, 0.0)


def _normalized(shared: Tensor, own: Tensor, is_shared: Tensor) -> Tensor:
    """Log-probabilities [n, S + 1] on the shared tokens and the unit, which does not count where it is one of them."""
    own = torch.where(is_shared, 10 * LOG_ZERO, own.clamp(min=LOG_ZERO))
    return torch.cat([shared.clamp(min=LOG_ZERO), own[:, None]], dim=-1).log_softmax(-1)


def partition(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """The finest common-boundary partition of one text cut in two ways: pieces of either side in each cell.

    Its cells put together are the text; no cell has a common boundary inside. Pieces behind the last common boundary
    are in none.

    Args:
        student: The pieces of one side.
        teacher: Those of the other.

    Raises:
        ValueError: They are not pieces of the same text, as far as both go.
    """
    own, other = b"".join(student), b"".join(teacher)
    length = min(len(own), len(other))
    if own[:length] != other[:length]:
        at = next(i for i in range(length) if own[i] != other[i])
        raise ValueError(f"byte {at} is {own[at : at + 8]!r} on one side and {other[at : at + 8]!r} on the other")
    cells: list[tuple[int, int]] = []
    i = j = ends = 0  # pieces taken on either side; how much further the student is, in bytes
    first_i = first_j = 0
    while i < len(student) or j < len(teacher):
        if ends <= 0 and i < len(student):
            ends += len(student[i])
            i += 1
        elif ends > 0 and j < len(teacher):
            ends -= len(teacher[j])
            j += 1
        else:
            break
        if ends == 0 and i > first_i and j > first_j:
            cells.append((i - first_i, j - first_j))
            first_i, first_j = i, j
    return cells
