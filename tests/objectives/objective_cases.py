"""Random positions and the obvious float64 formulas that the objective tests compare with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.interfaces import Objective, ResponseTokens
from opd_lightning.objectives import (
    DenseScores,
    DivergenceObjective,
    ForwardKL,
    FullVocabulary,
    Intersection,
    JensenShannon,
    ReverseKL,
    SampledToken,
    StudentTopK,
    Support,
    SymmetricDifference,
    TeacherTopK,
    Union,
)


@dataclass
class Case:
    logits: Tensor  # [n, V] student, float64
    teacher_logits: Tensor  # [n, V], float64
    response_ids: Tensor  # [n]
    rollout_log_probs: Tensor  # [n]

    @property
    def p(self):
        return self.logits.softmax(-1)

    @property
    def q(self):
        return self.teacher_logits.softmax(-1)

    def scores(self, temperature=1.0):
        return DenseScores((self.teacher_logits / temperature).log_softmax(-1), self.response_ids)

    @property
    def tokens(self) -> ResponseTokens:
        return make_tokens(self.response_ids, self.rollout_log_probs)

    def losses(self, objective: Objective, logits: Tensor | None = None) -> Tensor:
        request = objective.request()
        teacher = None if request is None else self.scores(request.temperature)
        return objective.token_losses(self.logits if logits is None else logits, teacher, self.tokens)

    def gradient(self, objective: Objective) -> Tensor:
        return gradient(lambda logits: self.losses(objective, logits), self.logits)

    def agreeing(self):
        """The same positions with a student that equals its teacher and sampled on-policy."""
        logits = self.teacher_logits
        sampled = logits.log_softmax(-1).gather(-1, self.response_ids[:, None]).squeeze(-1)
        return replace(self, logits=logits.clone(), rollout_log_probs=sampled)


def make_tokens(response_ids: Tensor, rollout_log_probs: Tensor) -> ResponseTokens:
    return ResponseTokens(response_ids, rollout_log_probs, torch.arange(len(response_ids)))


def make_case(seed=0, n=4, vocabulary=9, spread=2.0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def logits():
        return spread * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)

    student, teacher = logits(), logits()
    response_ids = torch.randint(vocabulary, (n,), generator=generator)
    rollout = (student + 0.1 * logits()).log_softmax(-1).gather(-1, response_ids[:, None]).squeeze(-1)
    return Case(student, teacher, response_ids, rollout)


def gradient(function, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return result


def expected_over_samples(case, objective, sampling_log_probs):
    """Sum over every token v of its sampling probability times the gradient of its sampled-token loss."""
    total = torch.zeros_like(case.logits)
    for token in range(case.logits.shape[-1]):
        ids = torch.full_like(case.response_ids, token)
        drawn = Case(case.logits, case.teacher_logits, ids, sampling_log_probs[:, token])
        total += sampling_log_probs[:, token, None].exp() * drawn.gradient(objective)
    return total


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return reverse_kl(q, p)


def jensen_shannon(beta: float):
    def value(p: Tensor, q: Tensor) -> Tensor:
        m = beta * q + (1 - beta) * p
        return beta * reverse_kl(q, m) + (1 - beta) * reverse_kl(p, m)

    return value


def top_sets(probabilities: Tensor, k: int) -> list[set[int]]:
    return [set(row.argsort(descending=True)[:k].tolist()) for row in probabilities]


def support_sets(case: Case, support: str, k: int) -> list[set[int]]:
    everything = set(range(case.logits.shape[-1]))
    return [
        {
            "sampled_token": {int(y)},
            "student_top_k": s,
            "teacher_top_k": t,
            "intersection": s & t,
            "union": s | t,
            "symmetric_difference": s ^ t,
            "full_vocabulary": everything,
        }[support]
        for s, t, y in zip(top_sets(case.p, k), top_sets(case.q, k), case.response_ids, strict=True)
    ]


def on_support(row: Tensor, tokens: set[int], normalization: str) -> Tensor:
    """Probabilities of one position on its support, as the obvious formula has them."""
    inside = row[sorted(tokens)]
    if normalization == "renormalize":
        return inside / inside.sum()
    if normalization == "tail":
        outside = row[[v for v in range(len(row)) if v not in tokens]]
        return torch.cat([inside, outside.sum()[None]])
    return inside


TOP_K_CLASSES = {
    "student_top_k": StudentTopK,
    "teacher_top_k": TeacherTopK,
    "intersection": Intersection,
    "union": Union,
    "symmetric_difference": SymmetricDifference,
}
TOP_K = list(TOP_K_CLASSES)
REFERENCES = {ReverseKL(): reverse_kl, ForwardKL(): forward_kl, JensenShannon(0.3): jensen_shannon(0.3)}
DIRECT = [
    *itertools.product(TOP_K, ["renormalize", "tail"]),
    ("sampled_token", "tail"),
    ("full_vocabulary", "none"),
]


def make_support(name: str, k: int, normalization: str = "renormalize") -> Support:
    """The support by its name in the grids; only top-k supports have a k and a choice of normalisation."""
    if name in TOP_K_CLASSES:
        return TOP_K_CLASSES[name](k, normalization)
    return SampledToken() if name == "sampled_token" else FullVocabulary()


def build(support: str, k: int, normalization: str = "renormalize", **factors) -> DivergenceObjective:
    return DivergenceObjective(make_support(support, k, normalization), **factors)
