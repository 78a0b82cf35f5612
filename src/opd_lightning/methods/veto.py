"""Veto: a target between teacher and student, which moves to the teacher's own (arXiv 2601.07155)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import ResponseTokens, Sampling, ScoreRequest, TeacherScores
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.objectives import Divergence, ForwardKL, ScoreObjective, StudentScores
from opd_lightning.objectives.arguments import check_factor, check_temperatures, check_whole_distribution
from opd_lightning.objectives.logprobs import close_slots


class Veto(ScoreObjective):
    """A divergence from the target Q proportional to q p^beta, in which each model can veto a token; p is detached.

    beta falls linearly from its start to 0 over the first steps of the run, and so Q becomes the teacher. The fixed
    point at a constant beta is q^(1 / (1 - beta)), sharper than the teacher; from beta = 1 on there is none, so it must
    fall. The step is that of the prompt stream, so a resumed run goes on where it was.

    Args:
        beta: Where it starts (the paper: 0.8 for reasoning, 1.0 for code, 0.3 for summaries).
        decay_steps: Steps after which it is 0: all of the run in the paper; null keeps it where it starts.
        divergence: From Q to p: ForwardKL is KL(Q || p), ReverseKL is KL(p || Q).
        student_temperature: Divides the student's logits; must equal the sampling temperature.
        teacher_temperature: Divides the teacher's logits.
        allow_biased_sampling: Accept rollouts that are not drawn from the student's whole distribution.
        chunk_tokens: Response tokens whose logits exist at once.

    Raises:
        ValueError: A number is outside its range.

    Source: arXiv 2601.07155, known to us from notes.
    """

    def __init__(
        self,
        beta: float = 0.8,
        decay_steps: int | None = None,
        divergence: Divergence = ForwardKL(),  # noqa: B008 - it has no state, and --print_config shows it
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        allow_biased_sampling: bool = False,
        chunk_tokens: int = 512,
    ) -> None:
        if not beta >= 0:
            raise ValueError(f"objective.beta: expected a number of at least 0 (0 is plain distillation), got {beta}.")
        if beta >= 1 and decay_steps is None:
            raise ValueError(
                f"objective.decay_steps: with beta={beta} the target has no fixed point, so beta must fall. Set"
                " decay_steps to the steps of the run (trainer.max_steps), or beta below 1."
            )
        check_factor("divergence", divergence, Divergence)
        check_temperatures(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        check_at_least(1, "objective", decay_steps=decay_steps, chunk_tokens=chunk_tokens)
        self.beta = beta
        self.decay_steps = decay_steps
        self.divergence = divergence
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.allow_biased_sampling = allow_biased_sampling
        self.chunk_tokens = chunk_tokens

    @override
    def request(self) -> ScoreRequest:
        return ScoreRequest(full_vocabulary=True, temperature=self.teacher_temperature)

    @override
    def check_sampling(self, sampling: Sampling) -> None:
        check_whole_distribution(sampling, self.student_temperature, self.allow_biased_sampling)

    @override
    def losses_from(self, student: StudentScores, teacher: TeacherScores | None, tokens: ResponseTokens) -> Tensor:
        assert teacher is not None
        log_p = student.full()
        with torch.no_grad():
            vetoed = self._betas(tokens).to(log_p)[:, None] * close_slots(log_p)
            target = (close_slots(teacher.full().to(log_p)) + vetoed).log_softmax(-1)
        return self.divergence.value(log_p, target)

    def _betas(self, tokens: ResponseTokens) -> Tensor:
        """Beta [n] of each token's step; at the start where no run is under way."""
        steps = tokens.extras.get("step", torch.zeros_like(tokens.rollout_log_probs)).double()
        if self.decay_steps is None:
            return torch.full_like(steps, self.beta)
        return self.beta * (1 - steps / self.decay_steps).clamp(min=0)
