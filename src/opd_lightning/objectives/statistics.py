"""What the training metrics say about each token, as sums and counts that are divided last.

Sums over chunks, micro-batches and ranks add up, so no metric depends on how a step was cut. Definitions follow
arXiv 2604.13016, not its code, where the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_lightning.interfaces import ScoreRequest, TeacherScores
from opd_lightning.objectives.divergences import ReverseKL
from opd_lightning.objectives.logprobs import close_slots, entropy
from opd_lightning.objectives.supports import normalize, same_tokens


@dataclass
class TokenStatistics:
    """Statistics of some response tokens.

    Attributes:
        sums: (sum, count) for each name, float32 scalars; sum / count is the mean over what was counted.
        maxima: Largest value for each name, float32 scalars; 0 where there was no token.
    """

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: TokenStatistics) -> None:
        """Add the statistics of further tokens."""
        for name, (total, count) in other.sums.items():
            old_total, old_count = self.sums.get(name, (0, 0))
            self.sums[name] = (old_total + total, old_count + count)
        for name, value in other.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value


@torch.no_grad()
def token_statistics(
    student_log_probs: Tensor,
    teacher: TeacherScores,
    response_ids: Tensor,
    rollout_log_probs: Tensor,
    answers: ScoreRequest,
    k: int = 16,
) -> TokenStatistics:
    """Statistics of one chunk of n response tokens: all that can be computed exactly from what the teacher answers.

    Always: `student_entropy` H(p); `student_top_mass`, the student's mass on its own k likeliest tokens;
    `sampled_log_ratio` log p(y) - log q(y), an unbiased and noisy estimate (k1) of the reverse KL; and how far the
    engine that sampled differs from the student that trains: `rollout_mismatch` |log p(y) - log p_rollout(y)|, its
    maximum `rollout_mismatch_max`, and `rollout_kl`, the estimate (k3) r - 1 - log r with r = p(y) / p_rollout(y) of
    KL(rollout || student).

    With the teacher's top k: those of `overlap_statistics`. With its whole vocabulary: also those of
    `vocabulary_statistics`.

    Args:
        student_log_probs: [n, V] tempered, normalised log-probabilities.
        teacher: Scores of the same n tokens.
        response_ids: int64 [n], the sampled tokens.
        rollout_log_probs: [n] their log-probabilities when they were drawn.
        answers: What the teacher was asked for, and so can tell.
        k: Size of both top-k lists; clipped to V.
    """
    student = close_slots(student_log_probs.detach())
    k = min(k, student.shape[-1])
    top_log_probs, top_ids = student.topk(k, dim=-1)
    sampled = student.gather(-1, response_ids[:, None]).squeeze(-1)
    mismatch = sampled - rollout_log_probs.to(sampled)
    values = {
        "student_top_mass": top_log_probs.exp().sum(-1),
        "sampled_log_ratio": sampled - close_slots(teacher.sampled().to(sampled)),
        "rollout_mismatch": mismatch.abs(),
        "rollout_kl": mismatch.expm1() - mismatch,
    }
    statistics = TokenStatistics(
        sums={name: sum_and_count(value) for name, value in values.items()},
        maxima={"rollout_mismatch_max": torch.cat([mismatch.new_zeros(1), mismatch.abs()]).max().float()},
    )
    if answers.full_vocabulary:
        full = close_slots(teacher.full().to(student))
        statistics.sums |= vocabulary_statistics(student, full)
        teacher_log_probs, teacher_ids = full.topk(k, dim=-1)
        statistics.sums |= overlap_statistics(top_ids, top_log_probs, teacher_ids, teacher_log_probs)
        return statistics
    statistics.sums["student_entropy"] = sum_and_count(entropy(student))
    if answers.top_k >= k:
        teacher_ids, teacher_log_probs = teacher.topk(k)
        statistics.sums |= overlap_statistics(top_ids, top_log_probs, teacher_ids, teacher_log_probs.to(student))
    return statistics


def vocabulary_statistics(student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of what needs both whole distributions.

    `reverse_kl` KL(p || q), `forward_kl` KL(q || p), `student_entropy` H(p), `teacher_entropy` H(q), and `entropy_gap`
    |H(q) - H(p)| of each position (not the difference of the means). The distributions are exponentiated once for all.

    Args:
        student: [n, V] log p, finite.
        teacher: [n, V] log q, finite.
    """
    p, q, log_ratio = student.exp(), teacher.exp(), student - teacher
    student_entropy, teacher_entropy = -(p * student).sum(-1), -(q * teacher).sum(-1)
    values = {
        "reverse_kl": (p * log_ratio).sum(-1),
        "forward_kl": -(q * log_ratio).sum(-1),
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
        "entropy_gap": (teacher_entropy - student_entropy).abs(),
    }
    return {name: sum_and_count(value) for name, value in values.items()}


def overlap_statistics(
    student_ids: Tensor, student_log_probs: Tensor, teacher_ids: Tensor, teacher_log_probs: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of what happens on I, the tokens that are in both top-k lists.

    `overlap_ratio` |I| / k, `overlap_mass_student` and `overlap_mass_teacher` are means over all positions. With both
    models renormalised on I, `overlap_advantage` is the mean over v in I of p(v) (log q(v) - log p(v)), and
    `overlap_reverse_kl` is KL(p || q), which is -|I| times it: the advantage alone moves towards 0 whenever |I| grows.
    These two are means over the positions with a non-empty I.

    Args:
        student_ids: int64 [n, k].
        student_log_probs: [n, k] of `student_ids`.
        teacher_ids: int64 [n, k].
        teacher_log_probs: [n, k] of `teacher_ids`.
    """
    same = same_tokens(student_ids, teacher_ids)
    mask = same.any(2)
    size = mask.sum(-1)
    there = teacher_log_probs[:, None, :].expand_as(same).masked_fill(~same, -torch.inf).amax(-1)
    divergence = ReverseKL().value(
        normalize(student_log_probs, mask, "renormalize"), normalize(there, mask, "renormalize"), mask
    )
    is_met = size > 0
    return {
        "overlap_ratio": sum_and_count(size / student_ids.shape[-1]),
        "overlap_mass_student": sum_and_count((student_log_probs.exp() * mask).sum(-1)),
        "overlap_mass_teacher": sum_and_count(there.exp().sum(-1)),
        "overlap_advantage": sum_and_count(-divergence / size.clamp(min=1), is_met),
        "overlap_reverse_kl": sum_and_count(divergence, is_met),
    }


def sum_and_count(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and number of the values [n] that count, as float32 scalars."""
    if mask is None:
        return values.sum().float(), torch.full((), float(values.numel()), device=values.device)
    return values.where(mask, 0.0).sum().float(), mask.sum().float()
