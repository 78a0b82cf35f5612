from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import make_tokens
from torch import nn

from opd_lightning.interfaces import LinearHead, ScoreRequest
from opd_lightning.objectives import (
    NLL,
    CandidateScore,
    Clipped,
    DenseScores,
    DivergenceObjective,
    Intersection,
    JensenShannon,
    SampledTokenObjective,
    StudentTopK,
    Union,
    compare_in_chunks,
    full_log_probs,
    token_facts,
)
from opd_lightning.objectives.fact_readings import FactReadings

N, H, V = 23, 6, 50
FULL = ScoreRequest(full_vocabulary=True)
FACTS = {"asked": FULL, "facts_k": 4}
VARIANTS = {
    "full": DivergenceObjective,
    "jensen_shannon": partial(DivergenceObjective, divergence=JensenShannon(0.3)),
    "student_top_k": partial(DivergenceObjective, StudentTopK(4)),
    "intersection": partial(DivergenceObjective, Intersection(8, "tail")),
    "union": partial(DivergenceObjective, Union(3), estimator=CandidateScore()),
    "sampled_token": partial(SampledTokenObjective, importance=Clipped()),
    "likelihood": NLL,
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


class Net(nn.Module):
    """An embedding that is also the head, as in tied language models."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, H, generator=generator, dtype=torch.float64))
        self.inner = nn.Parameter(torch.randn(H, H, generator=generator, dtype=torch.float64))

    def hidden(self, ids):
        return torch.tanh(self.embedding[ids] @ self.inner)

    @property
    def head(self):
        return LinearHead(self.embedding, None, V)


def material(n=N):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (n,), generator=generator)
    log_q = (2 * torch.randn(n, V, generator=generator, dtype=torch.float64)).log_softmax(-1)
    rollout = -3 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    return ids, DenseScores(log_q, ids.roll(1)), make_tokens(ids.roll(1), rollout)


def run(net, chunk_tokens, n=N, variant=DivergenceObjective, head=None, **options):
    ids, teacher, tokens = material(n)
    objective = variant(chunk_tokens=chunk_tokens)
    return compare_in_chunks(net.hidden(ids), head or net.head, objective, teacher, tokens, **options)


def gradients(net, *args, **kwargs):
    result = run(net, *args, **kwargs)
    return result, torch.autograd.grad(result.losses.sum(), list(net.parameters()))


@each_variant
@given(chunk_tokens=st.integers(1, N + 3))
@settings(max_examples=8)
def test_losses_and_gradients_do_not_depend_on_the_chunk_size(variant, chunk_tokens):
    net = Net()
    whole, expected = gradients(net, N, variant=variant)
    cut, actual = gradients(net, chunk_tokens, variant=variant)
    torch.testing.assert_close(cut.losses, whole.losses)
    torch.testing.assert_close(actual, expected)


def test_losses_are_those_of_the_objective_itself_and_may_be_weighted():
    net = Net()
    ids, teacher, tokens = material()
    expected = DivergenceObjective().token_losses(net.head(net.hidden(ids)), teacher, tokens)
    losses = run(net, 5).losses
    torch.testing.assert_close(losses, expected)
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    wanted = torch.autograd.grad((weights * expected).sum(), list(net.parameters()))
    torch.testing.assert_close(torch.autograd.grad((weights * losses).sum(), list(net.parameters())), wanted)


@given(chunk_tokens=st.integers(1, N + 3))
@settings(max_examples=8)
def test_facts_are_those_of_all_tokens_at_once(chunk_tokens):
    net = Net()
    ids, teacher, tokens = material()
    expected = token_facts(full_log_probs(net.head(net.hidden(ids))), teacher, tokens, FULL, 4)
    facts = run(net, chunk_tokens, **FACTS).facts
    torch.testing.assert_close(facts, expected, equal_nan=True)
    assert not any(values.requires_grad for values in facts.values())


def test_facts_are_skipped_unless_asked_for():
    assert run(Net(), 5).facts == {}
    assert run(Net(), 5, asked=FULL).facts == {}


class WithoutTeacher(NLL):
    def token_losses(self, student_logits, teacher, tokens):
        assert teacher is None
        return super().token_losses(student_logits, teacher, tokens)


def test_an_objective_that_asks_for_nothing_sees_no_teacher_but_the_facts_do():
    net = Net()
    facts = run(net, 5, variant=WithoutTeacher, **FACTS).facts
    torch.testing.assert_close(facts, run(net, 5, **FACTS).facts, equal_nan=True)
    ids, _, tokens = material()
    alone = compare_in_chunks(net.hidden(ids), net.head, WithoutTeacher(5), None, tokens, facts_k=4)
    assert set(alone.facts) == {"student_top_mass", "student_entropy", "rollout_mismatch", "rollout_kl"}
    torch.testing.assert_close(alone.losses, run(net, 5, variant=NLL).losses)


class Scaled(NLL):
    def token_losses(self, student_logits, teacher, tokens):
        return tokens.extras["scale"] * super().token_losses(student_logits, teacher, tokens)


def test_each_chunk_has_what_was_attached_to_its_tokens():
    net = Net()
    ids, _, tokens = material()
    scale = torch.arange(float(N))
    tokens = replace(tokens, extras={"scale": scale})
    results = compare_in_chunks(net.hidden(ids), net.head, Scaled(chunk_tokens=5), None, tokens)
    torch.testing.assert_close(results.losses, scale * run(net, N, variant=NLL).losses)
    results.losses.sum().backward()  # which a second pass would have as well


class Counting(DenseScores):
    """A teacher whose full log-probabilities are expensive."""

    calls = 0

    def full(self):
        Counting.calls += 1
        return super().full()

    def slice(self, start, stop):
        return Counting(self._log_probs[start:stop], self.response_ids[start:stop])


@pytest.mark.parametrize(("chunk_tokens", "forward_calls"), [(N, 1), (8, 3)])
def test_objective_and_facts_share_one_look_at_the_teacher(chunk_tokens, forward_calls):
    net = Net()
    ids, teacher, tokens = material()
    counting = Counting(teacher.full(), tokens.ids)
    Counting.calls = 0
    objective = DivergenceObjective(chunk_tokens=chunk_tokens)
    result = compare_in_chunks(net.hidden(ids), net.head, objective, counting, tokens, **FACTS)
    assert Counting.calls == forward_calls
    result.losses.sum().backward()
    assert Counting.calls == forward_calls


def test_facts_are_not_taken_again_in_the_backward_pass(monkeypatch):
    chunks = []
    begin = FactReadings.begin
    monkeypatch.setattr(FactReadings, "begin", lambda self, *args: chunks.append(args) or begin(self, *args))
    run(Net(), 8, counts_alike=False, **FACTS).losses.sum().backward()
    assert sum(len(args[-1]) for args in chunks) == N


def test_facts_are_taken_at_the_students_temperature():
    net = Net()
    ids, teacher, tokens = material()
    expected = token_facts(full_log_probs(net.head(net.hidden(ids)), 0.5), teacher, tokens, FULL, 4)
    facts = run(net, 8, variant=partial(DivergenceObjective, student_temperature=0.5), **FACTS).facts
    torch.testing.assert_close(facts["student_entropy"], expected["student_entropy"])


def test_without_gradients_nothing_is_kept_or_recomputed():
    with torch.no_grad():
        result = run(Net(), 4, **FACTS)
    assert not result.losses.requires_grad
    torch.testing.assert_close(result.losses, run(Net(), N).losses.detach())


class Dropping(DivergenceObjective):
    """An objective with randomness of its own."""

    def token_losses(self, student_logits, teacher, tokens):
        return super().token_losses(nn.functional.dropout(student_logits, 0.5), teacher, tokens)


@pytest.mark.parametrize("counts_alike", [True, False])
def test_randomness_is_the_same_in_a_second_pass(counts_alike):
    net = Net()
    torch.manual_seed(0)
    _, cut = gradients(net, 8, variant=Dropping, counts_alike=counts_alike)
    torch.manual_seed(0)
    ids, teacher, tokens = material()
    hidden = net.hidden(ids)
    rows = [slice(0, 8), slice(8, 16), slice(16, N)]
    losses = [Dropping().token_losses(net.head(hidden[r]), teacher.slice(r.start, r.stop), tokens[r]) for r in rows]
    torch.testing.assert_close(cut, torch.autograd.grad(torch.cat(losses).sum(), list(net.parameters())))


@each_variant
def test_no_tokens_cost_nothing_and_still_reach_every_parameter(variant):
    result, grads = gradients(Net(), 8, n=0, variant=variant, **FACTS)
    assert result.losses.shape == (0,)
    assert all((grad == 0).all() for grad in grads)
    assert result.facts
    assert all(values.shape == (0,) for values in result.facts.values())


def test_a_frozen_head_passes_gradients_to_the_hidden_states():
    weight = torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, teacher, tokens = material()
    grads = []
    for chunk_tokens in (5, N):
        hidden = torch.linspace(-1, 1, N * H, dtype=torch.float64).reshape(N, H).requires_grad_()
        objective = DivergenceObjective(chunk_tokens=chunk_tokens)
        head = LinearHead(weight, None, V)
        compare_in_chunks(hidden, head, objective, teacher, tokens).losses.sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0
