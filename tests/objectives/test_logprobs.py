import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.objectives.logprobs import (
    LOG_ZERO,
    close_slots,
    entropy,
    full_log_probs,
    log_probs_at,
    temper,
)


def random_logits(n=3, vocabulary=11, dtype=torch.float64):
    return 3 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_all_log_probs_agree_with_the_tempered_softmax(temperature):
    logits = random_logits()
    expected = (logits / temperature).softmax(-1).log()
    ids = torch.tensor([[0, 10, 3], [3, 3, 3], [9, 1, 0]])
    torch.testing.assert_close(full_log_probs(logits, temperature), expected)
    torch.testing.assert_close(log_probs_at(logits, ids, temperature), expected.gather(-1, ids))
    torch.testing.assert_close(log_probs_at(logits, ids[:, 0], temperature), expected[[0, 1, 2], ids[:, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast_before_the_log_sum_exp(dtype):
    logits = (8 * random_logits(vocabulary=4000)).to(dtype)
    expected = logits.double().log_softmax(-1)
    assert full_log_probs(logits).dtype == torch.float32
    torch.testing.assert_close(full_log_probs(logits).double(), expected, atol=1e-5, rtol=1e-6)
    ids = torch.tensor([[1], [2], [3]])
    torch.testing.assert_close(log_probs_at(logits, ids).double(), expected.gather(-1, ids), atol=1e-5, rtol=1e-6)
    assert temper(logits.double()).dtype == torch.float64


def test_gradients_of_log_probs_at_pass_gradcheck():
    logits = random_logits().requires_grad_()
    ids = torch.tensor([[0, 10], [3, 4], [9, 1]])
    assert torch.autograd.gradcheck(lambda x: log_probs_at(x, ids, 0.7), logits)


@given(st.integers(2, 40), st.floats(0, 8), st.integers(0, 1000))
def test_entropy_lies_between_zero_and_log_v(vocabulary, spread, seed):
    logits = spread * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = entropy(full_log_probs(logits))
    assert (result >= -1e-12).all()
    assert (result <= math.log(vocabulary) + 1e-12).all()
    torch.testing.assert_close(result, torch.distributions.Categorical(logits=logits).entropy())


def test_entropy_counts_impossible_tokens_as_nothing():
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy(log_probs), torch.tensor([math.log(2), 0.0]))


def test_close_slots_replaces_without_gradient():
    log_probs = torch.tensor([[-1.0, -math.inf, -2.0]], requires_grad=True)
    closed = close_slots(log_probs, torch.tensor([[True, True, False]]))
    assert closed.tolist() == [[-1.0, LOG_ZERO, LOG_ZERO]]
    closed.sum().backward()
    assert log_probs.grad.tolist() == [[1.0, 0.0, 0.0]]
    assert math.exp(LOG_ZERO) == 0
