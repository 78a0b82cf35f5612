"""What the training metrics say about each token: one number per token and fact, NaN where a fact is not defined.

Means over tokens are taken elsewhere, sums first and division last, so no metric depends on how a step was cut.
Definitions follow arXiv 2604.13016, not its code, where the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opd_lightning.interfaces import ResponseTokens, ScoreRequest, TeacherScores
from opd_lightning.objectives.divergences import ReverseKL
from opd_lightning.objectives.logprobs import close_slots, entropy
from opd_lightning.objectives.normalization import normalize
from opd_lightning.objectives.supports import look_up
from opd_lightning.objectives.top_tokens import top_tokens

STUDENT_FACTS = ("student_top_mass", "student_entropy", "rollout_mismatch", "rollout_kl")
SAMPLED_FACTS = ("sampled_log_ratio",)
OVERLAP_FACTS = (
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_advantage",
    "overlap_reverse_kl",
    "teacher_mass_above",
)
VOCABULARY_FACTS = ("reverse_kl", "forward_kl", "teacher_entropy", "entropy_gap")


def known_facts(asked: ScoreRequest | None, k: int) -> tuple[str, ...]:
    """Names of the facts that `token_facts` gives.

    Args:
        asked: What the teacher is asked for; None without a teacher.
        k: Size of the top-k lists; 0 when no facts are computed.
    """
    if k < 1:
        return ()
    names: tuple[str, ...] = STUDENT_FACTS
    if asked is not None:
        names += SAMPLED_FACTS
        if asked.full_vocabulary or asked.top_k >= k:
            names += OVERLAP_FACTS
        if asked.full_vocabulary:
            names += VOCABULARY_FACTS
    return names


@torch.no_grad()
def token_facts(
    student_log_probs: Tensor,
    teacher: TeacherScores | None,
    tokens: ResponseTokens,
    asked: ScoreRequest | None,
    k: int = 16,
) -> dict[str, Tensor]:
    """Facts of one chunk of n response tokens: all that can be computed exactly from what the teacher answers.

    Always: `student_entropy` H(p); `student_top_mass`, the student's mass on its own k likeliest tokens; and how far
    the engine that sampled differs from the student that trains: `rollout_mismatch` |log p(y) - log p_rollout(y)|, and
    `rollout_kl`, the estimate (k3) r - 1 - log r with r = p(y) / p_rollout(y) of KL(rollout || student).

    With a teacher: `sampled_log_ratio` log p(y) - log q(y), an unbiased and noisy estimate (k1) of the reverse KL. With
    its top k: those of `overlap_facts`. With its whole vocabulary: also those of `vocabulary_facts`.

    Args:
        student_log_probs: [n, V] tempered, normalised log-probabilities.
        teacher: Scores of the same n tokens; None without a teacher.
        tokens: The n tokens.
        asked: What the teacher was asked for, and so can tell.
        k: Size of both top-k lists; clipped to V.

    Returns:
        float32 [n] for each name of `known_facts`.
    """
    student = close_slots(student_log_probs.detach())
    wanted = known_facts(asked, k) if teacher is not None else known_facts(None, k)
    if teacher is not None and "reverse_kl" in wanted:
        sums = vocabulary_facts(student, close_slots(teacher.full().to(student)))
    else:
        sums = {"student_entropy": entropy(student)}
    top_log_probs, top_ids = top_tokens(student, min(k, student.shape[-1]))
    few = {"top_ids": top_ids, "top_log_probs": top_log_probs}
    few["sampled"] = student.gather(-1, tokens.ids[:, None]).squeeze(-1)
    if teacher is not None and "sampled_log_ratio" in wanted:
        few["teacher_sampled"] = close_slots(teacher.sampled().to(student))
    if teacher is not None and "overlap_ratio" in wanted:
        few["teacher_top_ids"], teacher_top = teacher.topk(top_ids.shape[-1])
        few["teacher_top_log_probs"] = close_slots(teacher_top.to(student))
    return facts_from_few(few | sums, tokens)


def facts_from_few(few: Mapping[str, Tensor], tokens: ResponseTokens) -> dict[str, Tensor]:
    """The facts of `token_facts`, from a few numbers per token.

    Args:
        few: By name, [n] or [n, k]: `sampled` log p of the sampled tokens; `top_ids` and `top_log_probs` of the
            student's likeliest; the same of the teacher (`teacher_...`) where it tells them. What has another name is
            the fact of that name.
        tokens: The n tokens.
    """
    few = dict(few)
    sampled, top_ids, top_log_probs = few.pop("sampled"), few.pop("top_ids"), few.pop("top_log_probs")
    mismatch = sampled - tokens.rollout_log_probs.to(sampled)
    facts = {
        "student_top_mass": top_log_probs.exp().sum(-1),
        "rollout_mismatch": mismatch.abs(),
        "rollout_kl": mismatch.expm1() - mismatch,
    }
    if "teacher_sampled" in few:
        facts["sampled_log_ratio"] = sampled - few.pop("teacher_sampled")
    if "teacher_top_ids" in few:
        listed = few.pop("teacher_top_ids"), few.pop("teacher_top_log_probs")
        facts |= overlap_facts(top_ids, top_log_probs, *listed)
        facts["teacher_mass_above"] = mass_above(tokens.ids, *listed)
    return {name: values.float() for name, values in (facts | few).items()}


def vocabulary_facts(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """What needs both whole distributions, [n] each.

    `reverse_kl` KL(p || q), `forward_kl` KL(q || p), `student_entropy` H(p), `teacher_entropy` H(q), and `entropy_gap`
    |H(q) - H(p)| of each position (not the difference of the means). The distributions are exponentiated once for all.

    Args:
        student: [n, V] log p, finite.
        teacher: [n, V] log q, finite.
    """
    p, q, log_ratio = student.exp(), teacher.exp(), student - teacher
    student_entropy, teacher_entropy = -(p * student).sum(-1), -(q * teacher).sum(-1)
    return {
        "reverse_kl": (p * log_ratio).sum(-1),
        "forward_kl": -(q * log_ratio).sum(-1),
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
        "entropy_gap": (teacher_entropy - student_entropy).abs(),
    }


def overlap_facts(
    student_ids: Tensor, student_log_probs: Tensor, teacher_ids: Tensor, teacher_log_probs: Tensor
) -> dict[str, Tensor]:
    """What happens on I, the tokens that are in both top-k lists, [n] each.

    `overlap_ratio` |I| / k, `overlap_mass_student` and `overlap_mass_teacher`. With both models renormalised on I,
    `overlap_advantage` is the mean over v in I of p(v) (log q(v) - log p(v)), and `overlap_reverse_kl` is KL(p || q),
    which is -|I| times it: the advantage alone moves towards 0 whenever |I| grows. These two are NaN where I is empty.

    Args:
        student_ids: int64 [n, k].
        student_log_probs: [n, k] of `student_ids`.
        teacher_ids: int64 [n, k].
        teacher_log_probs: [n, k] of `teacher_ids`.
    """
    there, mask = look_up(student_ids, teacher_ids, teacher_log_probs)
    size = mask.sum(-1)
    divergence = ReverseKL().value(
        normalize(student_log_probs, mask, "renormalize"), normalize(there, mask, "renormalize"), mask
    )
    divergence = divergence.masked_fill(size == 0, torch.nan)
    return {
        "overlap_ratio": size / student_ids.shape[-1],
        "overlap_mass_student": (student_log_probs.exp() * mask).sum(-1),
        "overlap_mass_teacher": there.exp().sum(-1),
        "overlap_advantage": -divergence / size.clamp(min=1),
        "overlap_reverse_kl": divergence,
    }


def mass_above(token_ids: Tensor, listed_ids: Tensor, listed_log_probs: Tensor) -> Tensor:
    """Mass [n] on the listed tokens that come before each token in its list; 1 where it is not listed.

    Args:
        token_ids: int64 [n].
        listed_ids: int64 [n, k], likeliest first.
        listed_log_probs: [n, k] of `listed_ids`.
    """
    masses, is_it = listed_log_probs.exp(), listed_ids == token_ids[:, None]
    before = ((masses.cumsum(-1) - masses) * is_it).sum(-1)
    return torch.where(is_it.any(-1), before, 1.0)
