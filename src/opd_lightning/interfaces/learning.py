"""The seams of learning: what is minimised at each token, and how much each token counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from opd_lightning.interfaces.generation import TrainedRollout
from opd_lightning.interfaces.scores import TeacherScores
from opd_lightning.interfaces.tokens import MicroBatch, ResponseTokens, ScoreRequest
from opd_lightning.interfaces.words import Rollout, Sampling

Normalizer = Literal["all_tokens", "kept_tokens", "sequences"]


class Objective(ABC):
    """One loss per response token.

    Attributes:
        student_temperature: Divides the student's logits; the metrics use the same.
        chunk_tokens: Response tokens whose logits exist at once: 8 bytes per vocabulary entry of each, with a teacher;
            an objective whose gradient goes through autograd (docs/objectives.md) takes some 40 to 80.
        value_is_divergence: Whether the losses are a divergence from the teacher, so that smaller is closer; the values
            of score functions are surrogates, of which only the gradient means something.
        needs_rollout_log_probs: Whether the losses read the log-probabilities that rollouts were drawn with.
        needs_log_ratios: Whether `shape` reads the extra `log_ratio` of whole rollouts. The teacher is then asked once
            more, before micro-batches are cut.
        compares_answers: Whether `shape` compares a prompt's answers with one another: a run with one answer per prompt
            is refused.
        compares_marks: Whether it compares the marks that the task gives them: a run without marks is refused, too.
        reads_members: Whether the losses ask a mixture of teachers for each of them (`TeacherScores.members`).
    """

    student_temperature: float = 1.0
    chunk_tokens: int = 512
    value_is_divergence: bool = False
    needs_rollout_log_probs: bool = False
    needs_log_ratios: bool = False
    compares_answers: bool = False
    compares_marks: bool = False
    reads_members: bool = False

    @abstractmethod
    def request(self) -> ScoreRequest | None:
        """What the losses ask of the teacher; None when they need no teacher."""

    @abstractmethod
    def token_losses(self, student_logits: Tensor, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        """Losses [n] of n response tokens, in nats, differentiable in the student's logits.

        Called for one chunk at a time, once, and differentiated at once. The loss of a token may read the logits of
        that token only: what it counts for is multiplied in afterwards.

        Args:
            student_logits: [n, V] untempered; half precision is upcast to float32.
            teacher: Scores of the same n tokens as `request` asked for; None when it asked for nothing.
            tokens: The n tokens.
        """

    def check_sampling(self, sampling: Sampling) -> None:  # noqa: B027 - not every objective minds
        """Make sure that rollouts sampled so are what the losses take expectations over.

        Raises:
            ValueError: They are not.
        """

    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        """Look at the step's rollouts as whole groups, those of one prompt together, before they are cut up.

        Return them in the same order, with values attached to their tokens (`Rollout.extras`); `token_losses` finds
        them in `tokens.extras`, and beside them `step`, the number of the step in the run (counted from 0), for what
        changes on the way. All rollouts of a prompt are on the same process.

        Where `needs_log_ratios`, each rollout comes with the extra `log_ratio`: log q(y) - log p_rollout(y) of the
        tokens y that the student wrote, 0 at others; p_rollout is the student that answered, whatever else had a say.
        """
        return groups

    def advantages(self, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens) -> Tensor | None:
        """Advantages [n] that the losses push the sampled tokens with, for who looks on; None where they have none.

        Args:
            student_logits: [n, V] untempered.
            teacher: Scores of the same n tokens, at least what `request` asks for.
            tokens: The n tokens.
        """
        return None


class Advantage(ABC):
    """Turns the reward of each sampled token into its advantage.

    Attributes:
        needs_log_ratios: Whether `shape` reads the extra `log_ratio` of whole rollouts (`Objective.needs_log_ratios`).
        compares_marks: Whether `shape` compares the marks of a prompt's answers with one another.
    """

    needs_log_ratios: bool = False
    compares_marks: bool = False

    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        """Look at the step's rollouts as whole groups before they are cut up, as `Objective.shape` does.

        The extra `log_ratio` is clipped as the rewards are.
        """
        return groups

    def request(self, needed: ScoreRequest) -> ScoreRequest:
        """What must be asked of the teacher, when the reward alone asks for `needed`."""
        return needed

    @abstractmethod
    def __call__(
        self, rewards: Tensor, student_logits: Tensor, teacher: TeacherScores, tokens: ResponseTokens
    ) -> Tensor:
        """Advantages [n], without gradient.

        Args:
            rewards: [n], of the sampled tokens, nats.
            student_logits: [n, V] tempered, detached.
            teacher: Scores of the same n tokens.
            tokens: The n tokens.
        """


class TokenWeighting(ABC):
    """How much each response token counts in the loss.

    Attributes:
        reads: Names of the facts it reads (docs/metrics.md); a run in which they cannot be known is refused.
        normalizer: What the weighted sum of a step is divided by: the number of "all_tokens", the sum of the weights
            ("kept_tokens": thinning out does not shrink the step), or "sequences" (each response counts the same: its
            tokens are divided by their number, the sum by the number of responses). Numbers are of all processes.
        looks_first: Whether all of a step is looked at without gradient before any of it is trained: `look`. Costs a
            second pass of student and teacher.
    """

    reads: tuple[str, ...] = ()
    normalizer: Normalizer = "all_tokens"
    looks_first: bool = False

    @abstractmethod
    def __call__(self, facts: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
        """Weights [N] of the response tokens, at least 0; no gradient flows through them.

        Args:
            facts: float32 [N] each, without gradient; NaN where a fact is not defined.
            micro_batch: The tokens, their positions, and the rollouts behind them.
        """

    def look(self, step: Sequence[TrainedRollout]) -> Sequence[Rollout]:
        """The step's rollouts as they are to be trained, where `looks_first`; `facts` are empty afterwards.

        Return them in the same order. Tokens that `student_wrote` leaves out reach no head; values attached to tokens
        (`Rollout.extras`, the same names for all) reach the losses.

        Args:
            step: All rollouts of this process, with the losses and facts of all their tokens.
        """
        return [each.rollout for each in step]
