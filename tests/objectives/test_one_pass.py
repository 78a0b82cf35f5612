"""Losses, facts and gradients of one pass against autograd over all logits in float64, for all heads and objectives."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from objective_cases import TOP_K, build, make_tokens

from opd_lightning.interfaces import LinearHead, ScoreRequest, TeacherScores
from opd_lightning.objectives import (
    NLL,
    CandidateScore,
    Clipped,
    DivergenceObjective,
    ForwardKL,
    HiddenScores,
    JensenShannon,
    Masked,
    ReverseKL,
    SampledTokenObjective,
    StudentTopK,
    TeacherTopK,
    compare_in_chunks,
    full_log_probs,
    one_pass,
    token_facts,
)

N, H, V, PADDED, K = 11, 6, 40, 43, 4
FULL = ScoreRequest(full_vocabulary=True)
DIVERGENCES = [ReverseKL(), ForwardKL(), JensenShannon(0.3), JensenShannon(0.0), JensenShannon(1.0)]
TEMPERED = {"student_temperature": 0.7, "teacher_temperature": 1.6}
OBJECTIVES = {
    **{f"whole {d}": DivergenceObjective(divergence=d, **TEMPERED, chunk_tokens=4) for d in DIVERGENCES},
    "whole, score": DivergenceObjective(estimator=CandidateScore(centered=True), **TEMPERED, chunk_tokens=4),
    **{
        f"{support} {normalization} {d}": build(support, K, normalization, divergence=d, **TEMPERED, chunk_tokens=4)
        for support, normalization, d in itertools.product(TOP_K, ["renormalize", "tail"], DIVERGENCES[:3])
    },
    "score": build("union", K, "none", estimator=CandidateScore("uniform"), **TEMPERED, chunk_tokens=4),
    "two coins": build("sampled_token", 1, chunk_tokens=4),
    "sampled": SampledTokenObjective(**TEMPERED, chunk_tokens=4),
    "sampled, clipped": SampledTokenObjective(importance=Clipped(), chunk_tokens=4),
    "sampled, masked": SampledTokenObjective(ForwardKL(), Masked(), advantage_clip=0.5, chunk_tokens=4),
    "likelihood": NLL(chunk_tokens=4),
}
HEADS = {
    "plain": {},
    "padded": {"rows": PADDED},
    "bias": {"bias": True, "rows": PADDED},
    "scale and cap": {"scale": 0.4, "softcap": 2.5},
}


class Setting:
    """Weights of a small model with a tied or an adapted head, its teacher, and the tokens."""

    def __init__(self, dtype=torch.float64, rows=V, bias=False, excluded=(), **head):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.ids = torch.randint(V, (N,), generator=generator)
        self.embedding = normal(rows, H).requires_grad_()
        self.inner = normal(H, H).requires_grad_()
        self.adapter = [normal(rows, 2).requires_grad_(), normal(2, H).requires_grad_()]
        self.bias = normal(rows) if bias or excluded else None
        if self.bias is not None:
            self.bias[list(excluded)] = -math.inf
            self.bias.requires_grad_()
        self.options = head
        self.tokens = make_tokens(self.ids.roll(1), -3 + 0.1 * normal(N))
        self.teacher_hidden = normal(N, 5)
        self.teacher_head = LinearHead(normal(rows, 5), None, V)

    def hidden(self):
        return torch.tanh(self.embedding[self.ids] @ self.inner)

    def head(self, kind="tied"):
        weight = {
            "tied": lambda: self.embedding,
            "adapted": lambda: self.embedding + self.adapter[0] @ self.adapter[1],
            "frozen": lambda: self.embedding.detach(),
        }[kind]()
        bias = self.bias if self.bias is None or kind != "frozen" else self.bias.detach()
        return LinearHead(weight, bias, V, **self.options)

    def teacher(self, objective):
        request = objective.request() or FULL
        return HiddenScores(self.teacher_hidden, self.tokens.ids, self.teacher_head, request.temperature)

    def parameters(self):
        return [self.embedding, self.inner, *self.adapter, *([] if self.bias is None else [self.bias])]

    def reference(self, objective, kind="tied", factors=None):
        """Losses, facts and gradients by autograd over all logits at once."""
        logits = self.head(kind)(self.hidden())
        losses = objective.token_losses(logits, self.teacher(objective), self.tokens)
        student = full_log_probs(logits.detach(), objective.student_temperature)
        facts = token_facts(student, self.teacher(objective), self.tokens, FULL, K)
        return losses, facts, self.gradients((losses if factors is None else factors * losses).sum())

    def one_pass(self, objective, kind="tied", factors=None, **options):
        compared = compare_in_chunks(
            self.hidden(), self.head(kind), objective, self.teacher(objective), self.tokens, asked=FULL, facts_k=K,
            **options,
        )  # fmt: skip
        losses = compared.losses if factors is None else factors * compared.losses
        return compared.losses, compared.facts, self.gradients(losses.sum())

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.parameters(), allow_unused=True, materialize_grads=True)


def assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    torch.testing.assert_close(actual[1], expected[1], equal_nan=True, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))
    torch.testing.assert_close(actual[2], expected[2], **tolerance)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(one_pass, "_ENTRIES_PER_BLOCK", 3 * V)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_losses_facts_and_gradients_are_those_of_autograd_over_all_logits(objective):
    for head in HEADS.values():
        setting = Setting(**head)
        assert_same(setting.one_pass(objective), setting.reference(objective))


SOME = [OBJECTIVES[name] for name in (f"whole {ReverseKL()}", f"student_top_k tail {ReverseKL()}", "sampled")]


@pytest.mark.parametrize("kind", ["tied", "adapted", "frozen"])
@pytest.mark.parametrize("counts_alike", [True, False])
def test_tokens_may_count_differently_whatever_is_trained(kind, counts_alike):
    setting, factors = Setting(bias=True), torch.linspace(0, 2, N, dtype=torch.float64)
    for objective in SOME:
        assert_same(
            setting.one_pass(objective, kind, factors, counts_alike=counts_alike),
            setting.reference(objective, kind, factors),
        )
        assert_same(setting.one_pass(objective, kind, counts_alike=counts_alike), setting.reference(objective, kind))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_tokens_that_the_student_excludes_get_no_gradient(objective):
    setting = Setting(excluded=[1, 7])
    actual, expected = setting.one_pass(objective), setting.reference(objective)
    assert_same(actual, expected)
    assert (actual[2][-1][[1, 7]] == 0).all()


def test_a_second_backward_pass_gives_the_same():
    setting = Setting()
    compared = compare_in_chunks(setting.hidden(), setting.head(), SOME[0], setting.teacher(SOME[0]), setting.tokens)
    first = torch.autograd.grad(compared.losses.sum(), setting.parameters()[:2], retain_graph=True)
    second = torch.autograd.grad(compared.losses.sum(), setting.parameters()[:2])
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_float32_keeps_its_digits(objective):
    narrow, wide = Setting(torch.float32), Setting()
    actual, expected = narrow.one_pass(objective), wide.reference(objective)
    assert actual[0].dtype == torch.float32
    for mine, other in zip(actual[2], expected[2], strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-6


@pytest.mark.parametrize("objective", SOME, ids=["whole", "tail", "sampled"])
def test_under_bfloat16_autocast_gradients_are_summed_in_float32(objective):
    setting = Setting(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, gradients = setting.one_pass(objective)
        expected = setting.reference(objective)
    assert losses.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(losses, expected[0], rtol=0.05, atol=0.02)
    for mine, other in zip(gradients, expected[2], strict=True):
        assert (mine - other).norm() <= 0.03 * other.norm() + 1e-6


def test_sums_over_many_chunks_keep_what_bfloat16_would_lose():
    """Each chunk adds 1/512 of the sum, which a bfloat16 sum would swallow."""
    count, weight = 512, torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden, ids = torch.ones(count, 1, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.int64)
    tokens = make_tokens(ids, torch.zeros(count))
    compare_in_chunks(hidden, LinearHead(weight, None, 2), NLL(1), None, tokens).losses.sum().backward()
    assert weight.grad[:, 0].tolist() == [-count / 2, count / 2]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("support", ["full_vocabulary", *TOP_K, "sampled_token"])
def test_a_student_that_is_its_teacher_has_a_gradient_of_exactly_0(support, divergence):
    setting = Setting(torch.float32)
    objective = build(support, K, "tail", divergence=divergence, chunk_tokens=4)
    hidden = setting.hidden().detach().requires_grad_()
    teacher = HiddenScores(
        hidden.detach(), setting.tokens.ids, replace(setting.head(), weight=setting.embedding.detach())
    )
    compare_in_chunks(hidden, setting.head(), objective, teacher, setting.tokens).losses.sum().backward()
    assert (hidden.grad == 0).all() and (setting.embedding.grad == 0).all()


class Listing(TeacherScores):
    """A teacher behind a server: its likeliest tokens only."""

    knows_full = False

    def __init__(self, scores):
        self._scores, self.response_ids = scores, scores.response_ids

    def slice(self, start, stop):
        return Listing(self._scores.slice(start, stop))

    def full(self):
        raise AssertionError("asked for the whole vocabulary")

    def at(self, token_ids):
        return self._scores.at(token_ids)

    def topk(self, k):
        return self._scores.topk(k)


@pytest.mark.parametrize("support", [TeacherTopK(K), TeacherTopK(K, "tail"), StudentTopK(K)])
def test_a_teacher_that_lists_its_tokens_is_asked_for_no_more(support):
    setting, objective = Setting(), DivergenceObjective(support, chunk_tokens=4)
    asked = ScoreRequest(top_k=K)
    listing = Listing(setting.teacher(objective))
    compared = compare_in_chunks(
        setting.hidden(), setting.head(), objective, listing, setting.tokens, asked=asked, facts_k=K
    )
    logits = setting.head()(setting.hidden())
    expected = objective.token_losses(logits, listing, setting.tokens)
    torch.testing.assert_close(compared.losses, expected)
    torch.testing.assert_close(setting.gradients(compared.losses.sum()), setting.gradients(expected.sum()))
    facts = token_facts(full_log_probs(logits.detach()), listing, setting.tokens, asked, K)
    torch.testing.assert_close(compared.facts, facts, equal_nan=True, rtol=1e-5, atol=1e-6)


class Softer(DivergenceObjective):
    """Changes what the losses of its base are computed from."""

    def token_losses(self, student_logits, teacher, tokens):
        return 2 * super().token_losses(student_logits / 2, teacher, tokens)


def test_an_objective_that_changes_token_losses_is_taken_at_its_word():
    setting, objective = Setting(**HEADS["scale and cap"]), Softer(chunk_tokens=4)
    assert_same(setting.one_pass(objective), setting.reference(objective))
