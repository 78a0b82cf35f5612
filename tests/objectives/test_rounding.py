"""Float32 against float64: where digits could be lost, and where nothing may move."""

import itertools

import pytest
import torch
from objective_cases import TOP_K, make_support, make_tokens

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.objectives import (
    CandidateScore,
    DenseScores,
    DivergenceObjective,
    ForwardKL,
    FullVocabulary,
    JensenShannon,
    ReverseKL,
    SampledToken,
    SampledTokenObjective,
    StudentTopK,
    TeacherTopK,
)
from opd_lightning.objectives.logprobs import full_log_probs
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.comparison import compare

TAILS = [StudentTopK(4, "tail"), TeacherTopK(4, "tail")]
DIVERGENCES = [ReverseKL(), ForwardKL(), JensenShannon(0.3)]
SCORES = [
    CandidateScore(weighting, scale)
    for weighting in ("student_probability", "teacher_probability", "uniform")
    for scale in ("normalized", "raw")
]


class Listed(DenseScores):
    """A teacher that knows its likeliest tokens only."""

    knows_full = False

    def at(self, token_ids):
        return self._log_probs.gather(-1, token_ids)

    def topk(self, k):
        log_probs, ids = self._log_probs.topk(k)
        return ids, log_probs

    def full(self):
        raise AssertionError("asked for the whole vocabulary")


def run(objective, student_logits, teacher_logits, scores=DenseScores):
    logits = student_logits.clone().requires_grad_()
    ids = student_logits.argmax(-1)
    teacher = scores(full_log_probs(teacher_logits), ids)
    losses = objective.token_losses(logits, teacher, make_tokens(ids, torch.zeros(len(ids))))
    losses.sum().backward()
    return losses.detach(), logits.grad


def sharp_logits(seed, n=64, vocabulary=500, gap=14.0):
    """Positions whose first four tokens hold all but some 1e-6 to 1e-4 of the mass."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, :4] += gap + 3 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return logits.float().double()  # both precisions see the same


@pytest.mark.parametrize(
    ("support", "estimator", "divergence"),
    [
        *itertools.product([*TAILS, SampledToken()], [DivergenceObjective().estimator], DIVERGENCES),
        *itertools.product(TAILS, [CandidateScore("uniform")], [ReverseKL()]),  # of one sampled token it is refused
    ],
)
@pytest.mark.parametrize("gaps", [(14.0, 3.0), (3.0, 14.0), (14.0, 14.0)])
def test_a_tiny_tail_keeps_its_digits(support, estimator, divergence, gaps):
    objective = DivergenceObjective(support, divergence, estimator)
    student, teacher = sharp_logits(0, gap=gaps[0]), sharp_logits(1, gap=gaps[1])
    expected_losses, expected_gradient = run(objective, student, teacher)
    losses, gradient = run(objective, student.float(), teacher.float())
    assert (losses - expected_losses).norm() <= 1e-4 * expected_losses.norm()
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize(
    ("support", "estimator"),
    [
        *itertools.product(["full_vocabulary", *TOP_K], [DivergenceObjective().estimator, *SCORES]),
        ("sampled_token", DivergenceObjective().estimator),
    ],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_where_both_agree_the_gradient_is_0_to_the_last_bit(support, divergence, estimator):
    support = FullVocabulary() if support == "full_vocabulary" else make_support(support, 4, "tail")
    student = sharp_logits(0).float()
    _, gradient = run(DivergenceObjective(support, divergence, estimator), student, student)
    if isinstance(divergence, JensenShannon) and isinstance(estimator, CandidateScore):
        assert gradient.abs().max() < 1e-5  # the mixture is rounded
    else:
        assert (gradient == 0).all()


@pytest.mark.parametrize("estimator", [DivergenceObjective().estimator, *SCORES])
def test_of_a_teacher_that_lists_its_tokens_rounding_is_not_learnt(estimator):
    objective = DivergenceObjective(TeacherTopK(4, "tail"), estimator=estimator)
    student = sharp_logits(0, gap=24.0).float()
    _, gradient = run(objective, student, student, Listed)
    assert gradient.norm() < 1e-5
    # a tail that is there is learnt
    teacher = sharp_logits(1, gap=3.0)
    losses, gradient = run(objective, student, teacher.float(), Listed)
    expected_losses, expected_gradient = run(objective, student.double(), teacher)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("support", "normalization", "estimator"),
    [
        *itertools.product(["full_vocabulary", *TOP_K], ["renormalize", "tail"], [DivergenceObjective().estimator]),
        ("full_vocabulary", "none", DivergenceObjective().estimator),  # of some tokens it is refused
        *itertools.product(["full_vocabulary", *TOP_K], ["renormalize", "tail", "none"], SCORES),
    ],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_leave_losses_and_squared_gradients_finite(support, normalization, divergence, estimator):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (1e4 * (2 * torch.rand(8, 200, generator=generator) - 1) for _ in range(2))
    objective = DivergenceObjective(make_support(support, 16, normalization), divergence, estimator)
    losses, gradient = run(objective, student, teacher)
    assert losses.isfinite().all() and gradient.square().sum().isfinite()


# --------------------------------------------------------------------------------------------------- the whole models


@pytest.mark.parametrize(
    "objective",
    [
        DivergenceObjective(),
        DivergenceObjective(divergence=ForwardKL()),
        DivergenceObjective(divergence=JensenShannon(0.5)),
        DivergenceObjective(StudentTopK(16, "tail")),
        DivergenceObjective(StudentTopK(16, "tail"), estimator=CandidateScore("uniform")),
    ],
)
def test_a_student_that_is_its_teacher_stays_where_it_is_under_adamw(tiny_qwen3_folder, objective):
    student, teacher = HFStudent(str(tiny_qwen3_folder)), HFTeacher(str(tiny_qwen3_folder), dtype="float32")
    model = student.load()
    teacher.setup(student, model, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        rollouts = []
        for seed in range(4):
            prompt, response = (torch.randint(7, 80, (n + seed + step,), generator=generator) for n in (3, 9))
            known = torch.zeros(len(response))
            rollouts.append(Rollout(Problem("x", (), ""), prompt, response, known, finished=True, seed=seed))
        batch = collate(rollouts, 0)
        (comparison,) = compare(student, model, [batch], objective, teacher, objective.request())
        comparison.losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, before, model.parameters()))


def test_the_reward_of_a_sampled_token_is_rounding_where_both_agree():
    student = sharp_logits(0, gap=3.0).float()
    _, gradient = run(SampledTokenObjective(), student, student)
    assert gradient.abs().max() < 1e-5
