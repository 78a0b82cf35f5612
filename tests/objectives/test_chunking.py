import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import (
    DenseScores,
    JensenShannon,
    Objective,
    full_log_probs,
    sum_over_chunks,
    token_statistics,
)

N, H, V = 23, 6, 50
FULL = ScoreRequest(full_vocabulary=True)
VARIANTS = [
    {},
    {"divergence": JensenShannon(0.3)},
    {"support": "student_top_k", "k": 4},
    {"support": "intersection", "k": 8, "normalization": "tail"},
    {"support": "union", "k": 3, "estimator": "score_function"},
    {"support": "sampled_token", "estimator": "score_function", "importance": "ppo"},
]


class Net(nn.Module):
    """An embedding that is also the head, as in tied language models."""

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, H, generator=generator, dtype=torch.float64))
        self.inner = nn.Parameter(torch.randn(H, H, generator=generator, dtype=torch.float64))
        self.dropout = nn.Dropout(dropout)

    def hidden(self, ids):
        return torch.tanh(self.embedding[ids] @ self.inner)

    def project(self, hidden):
        return self.dropout(hidden) @ self.embedding.T


def material(n=N):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (n,), generator=generator)
    log_q = (2 * torch.randn(n, V, generator=generator, dtype=torch.float64)).log_softmax(-1)
    rollout = -3 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    return ids, DenseScores(log_q, ids.roll(1)), ids.roll(1), rollout


def run(net, chunk_tokens, n=N, answers=None, **variant):
    ids, teacher, response_ids, rollout = material(n)
    objective = Objective(chunk_tokens=chunk_tokens, **variant)
    return sum_over_chunks(
        net.hidden(ids), net.project, objective, teacher, response_ids, rollout, answers=answers, statistics_k=4
    )


def gradients(net, *args, **kwargs):
    result = run(net, *args, **kwargs)
    return result, torch.autograd.grad(result.loss_sum, list(net.parameters()))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(chunk_tokens=st.integers(1, N + 3))
@settings(max_examples=8)
def test_losses_and_gradients_do_not_depend_on_the_chunk_size(variant, chunk_tokens):
    net = Net()
    whole, expected = gradients(net, N, **variant)
    cut, actual = gradients(net, chunk_tokens, **variant)
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum)
    torch.testing.assert_close(cut.token_losses, whole.token_losses)
    torch.testing.assert_close(actual, expected)


def test_the_sum_is_that_of_the_objective_itself():
    net = Net()
    ids, teacher, response_ids, rollout = material()
    expected = Objective().token_losses(net.project(net.hidden(ids)), teacher, response_ids, rollout)
    result = run(net, 5)
    torch.testing.assert_close(result.token_losses, expected.detach())
    torch.testing.assert_close(result.loss_sum, expected.sum())
    assert not result.token_losses.requires_grad
    wanted = torch.autograd.grad(expected.sum(), list(net.parameters()))
    torch.testing.assert_close(torch.autograd.grad(result.loss_sum, list(net.parameters())), wanted)


@given(chunk_tokens=st.integers(1, N + 3))
@settings(max_examples=8)
def test_statistics_are_those_of_all_tokens_at_once(chunk_tokens):
    net = Net()
    ids, teacher, response_ids, rollout = material()
    log_p = full_log_probs(net.project(net.hidden(ids)))
    expected = token_statistics(log_p, teacher, response_ids, rollout, FULL, 4)
    result = run(net, chunk_tokens, answers=FULL).statistics
    assert result.sums.keys() == expected.sums.keys()
    for name, (total, count) in result.sums.items():
        torch.testing.assert_close(total, expected.sums[name][0], rtol=1e-5, atol=1e-5)
        assert count == expected.sums[name][1]
        assert not total.requires_grad
    torch.testing.assert_close(result.maxima, expected.maxima)


def test_statistics_are_skipped_unless_asked_for():
    result = run(Net(), 5)
    assert result.statistics.sums == {}
    assert result.statistics.maxima == {}


class Counting(DenseScores):
    """A teacher whose full log-probabilities are expensive."""

    calls = 0

    def full(self):
        Counting.calls += 1
        return super().full()

    def slice(self, start, stop):
        return Counting(self._log_probs[start:stop], self._response_ids[start:stop])


@pytest.mark.parametrize(("chunk_tokens", "forward_calls"), [(N, 1), (8, 3)])
def test_objective_and_statistics_share_one_look_at_the_teacher(chunk_tokens, forward_calls):
    net = Net()
    ids, teacher, response_ids, rollout = material()
    Counting.calls = 0
    result = sum_over_chunks(
        net.hidden(ids),
        net.project,
        Objective(chunk_tokens=chunk_tokens),
        Counting(teacher.full(), response_ids),
        response_ids,
        rollout,
        answers=FULL,
    )
    assert Counting.calls == forward_calls
    result.loss_sum.backward()
    assert Counting.calls == (1 if forward_calls == 1 else 2 * forward_calls)


def test_statistics_are_not_taken_again_in_the_backward_pass(monkeypatch):
    calls = []

    def counting(*args):
        calls.append(args)
        return token_statistics(*args)

    monkeypatch.setattr("opd_lightning.objectives.chunking.token_statistics", counting)
    with set_checkpoint_early_stop(False):  # which would hide it, as the losses come before the statistics
        run(Net(), 8, answers=FULL).loss_sum.backward()
    assert len(calls) == 3


def test_statistics_are_taken_at_the_students_temperature():
    net = Net()
    ids, teacher, response_ids, rollout = material()
    log_p = full_log_probs(net.project(net.hidden(ids)), 0.5)
    expected = token_statistics(log_p, teacher, response_ids, rollout, FULL, 4).sums["student_entropy"]
    result = run(net, 8, answers=FULL, student_temperature=0.5).statistics.sums["student_entropy"]
    torch.testing.assert_close(result, expected)


class Watched:
    """A projection that remembers which of its logits are still alive, and how often it ran."""

    def __init__(self, net):
        self.net, self.references, self.most_alive = net, [], 0

    def __call__(self, hidden):
        logits = self.net.project(hidden)
        self.references.append(weakref.ref(logits))
        self.most_alive = max(self.most_alive, self.alive())
        return logits

    def alive(self):
        return sum(reference() is not None for reference in self.references)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_logits_outlive_their_chunk(variant):
    net = Net()
    ids, teacher, response_ids, rollout = material()
    watched = Watched(net)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    objective = Objective(chunk_tokens=4, **variant)
    hidden = net.hidden(ids)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = sum_over_chunks(hidden, watched, objective, teacher, response_ids, rollout, answers=FULL)
    assert len(watched.references) == 6
    assert watched.alive() == 0
    assert watched.most_alive <= 2  # the last chunk's may die only when the next one's replace them
    per_token = [tensor for tensor in saved if tensor.dim() == 2 and tensor.shape[-1] == V]
    assert per_token == []
    result.loss_sum.backward()
    assert len(watched.references) == 12
    assert watched.most_alive <= 2


class Remembering(DenseScores):
    """A teacher whose slices keep what they computed."""

    references = []

    def slice(self, start, stop):
        part = Remembering(self._log_probs[start:stop], self._response_ids[start:stop])
        Remembering.references.append(weakref.ref(part))
        return part


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_slice_of_the_teachers_scores_outlives_its_chunk(variant):
    net = Net()
    ids, teacher, response_ids, rollout = material()
    Remembering.references = []
    sum_over_chunks(
        net.hidden(ids),
        net.project,
        Objective(chunk_tokens=4, **variant),
        Remembering(teacher.full(), response_ids),
        response_ids,
        rollout,
        answers=FULL,
    )
    assert len(Remembering.references) == 6
    assert not any(reference() for reference in Remembering.references)


def test_a_single_chunk_is_not_recomputed():
    net = Net()
    ids, teacher, response_ids, rollout = material()
    watched = Watched(net)
    result = sum_over_chunks(net.hidden(ids), watched, Objective(), teacher, response_ids, rollout)
    result.loss_sum.backward()
    assert len(watched.references) == 1


def test_without_gradients_nothing_is_kept_or_recomputed():
    with torch.no_grad():
        result = run(Net(), 4, answers=FULL)
    assert not result.loss_sum.requires_grad
    torch.testing.assert_close(result.loss_sum, run(Net(), N).loss_sum.detach())


def test_dropout_in_the_head_is_the_same_in_the_recomputation():
    net = Net(dropout=0.5)
    torch.manual_seed(0)
    _, cut = gradients(net, 8)
    torch.manual_seed(0)
    ids, teacher, response_ids, rollout = material()
    hidden = net.hidden(ids)
    rows = [slice(0, 8), slice(8, 16), slice(16, N)]
    losses = [
        Objective().token_losses(net.project(hidden[r]), teacher.slice(r.start, r.stop), response_ids[r], rollout[r])
        for r in rows
    ]
    torch.testing.assert_close(cut, torch.autograd.grad(torch.cat(losses).sum(), list(net.parameters())))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_tokens_cost_nothing_and_still_reach_every_parameter(variant):
    net = Net()
    result, grads = gradients(net, 8, n=0, answers=FULL, **variant)
    assert result.loss_sum == 0
    assert result.token_losses.shape == (0,)
    assert all((grad == 0).all() for grad in grads)
    assert all(count == 0 for _, count in result.statistics.sums.values())


def test_a_frozen_head_passes_gradients_to_the_hidden_states():
    head = torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, teacher, response_ids, rollout = material()
    grads = []
    for chunk_tokens in (5, N):
        hidden = torch.linspace(-1, 1, N * H, dtype=torch.float64).reshape(N, H).requires_grad_()
        objective = Objective(chunk_tokens=chunk_tokens)
        sum_over_chunks(hidden, lambda h: h @ head.T, objective, teacher, response_ids, rollout).loss_sum.backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0
