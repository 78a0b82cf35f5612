import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.interfaces import Problem, Rollout, TokenWeighting
from opd_lightning.objectives.token_weights import known_divisor, loss_factors, weigh_tokens
from opd_lightning.rollouts.batching import collate


class Given(TokenWeighting):
    """Weights that somebody has thought up."""

    def __init__(self, weights, normalizer="all_tokens"):
        self.weights, self.normalizer = weights, normalizer

    def __call__(self, facts, micro_batch):
        return self.weights


class OfFacts(TokenWeighting):
    reads = ("student_entropy",)

    def __call__(self, facts, micro_batch):
        return facts["student_entropy"] * (micro_batch.tokens.positions + 1)


def make_batch(*lengths, num_hidden=0):
    """Responses of these lengths; the environment wrote `num_hidden` more tokens at the end of each."""
    return collate(
        [
            Rollout(
                problem=Problem(uid=str(i), messages=(), answer=""),
                prompt_ids=torch.tensor([1]),
                response_ids=torch.arange(length + num_hidden),
                log_probs=torch.zeros(length + num_hidden),
                finished=True,
                seed=i,
                student_wrote=torch.arange(length + num_hidden) < length if num_hidden else None,
            )
            for i, length in enumerate(lengths)
        ],
        pad_id=0,
    )


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@pytest.mark.parametrize("normalizer", ["all_tokens", "kept_tokens", "sequences"])
@given(lengths)
def test_weights_are_taken_as_they_are(normalizer, sizes):
    weights, batch = torch.rand(sum(sizes)), make_batch(*sizes)
    assert torch.equal(weigh_tokens(Given(weights, normalizer), {}, batch), weights)
    if normalizer != "sequences":
        assert torch.equal(loss_factors(weights, normalizer, batch), weights)


@given(lengths, st.integers(0, 3))
def test_by_sequences_each_response_is_divided_by_its_own_length(sizes, num_hidden):
    weights = torch.rand(sum(sizes))
    result = loss_factors(weights, "sequences", make_batch(*sizes, num_hidden=num_hidden))
    parts = [part / len(part) for part in weights.split(sizes)]
    torch.testing.assert_close(result, torch.cat(parts))


def test_facts_and_positions_reach_the_weighting():
    facts = {"student_entropy": torch.tensor([1.0, 2.0, 3.0])}
    assert weigh_tokens(OfFacts(), facts, make_batch(2, 1)).tolist() == [1, 4, 3]


def test_weights_are_float32_without_gradient_whatever_they_were():
    for weights in (torch.tensor([True, False]), torch.tensor([1, 0]), torch.tensor([1.0, 0.0], requires_grad=True)):
        result = weigh_tokens(Given(weights), {}, make_batch(2))
        assert result.dtype == torch.float32
        assert not result.requires_grad
        assert result.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), r"model\.token_weighting: Given gave weights of shape \(2,\); .* of shape \(3,\)"),
        (torch.ones(3, 1), r"weights of shape \(3, 1\)"),
        (torch.tensor(1.0), r"weights of shape \(\)"),
        (1.0, r"Given gave 1\.0; expected a tensor with one weight per response token"),
        (torch.tensor([1.0, math.nan, 1.0]), r"Given gave a weight that is negative or not finite.*nan_to_num"),
        (torch.tensor([1.0, math.inf, 1.0]), r"negative or not finite"),
        (torch.tensor([1.0, -0.1, 1.0]), r"negative or not finite"),
    ],
)
def test_what_is_no_weight_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        weigh_tokens(Given(weights), {}, make_batch(2, 1))


def test_the_divisor_is_known_beforehand_unless_the_weights_say_it():
    micro_batches = [make_batch(2, 3), make_batch(4, num_hidden=2)]
    assert known_divisor("all_tokens", micro_batches) == 9
    assert known_divisor("sequences", micro_batches) == 3
    assert known_divisor("kept_tokens", micro_batches) is None
    # a response of which nothing is trained counts in no mean, those over responses included
    assert known_divisor("sequences", [make_batch(2, 0, 3, num_hidden=1), make_batch(0, num_hidden=1)]) == 2


def test_a_normalizer_that_does_not_exist_is_refused():
    message = r"model\.token_weighting\.normalizer: expected one of all_tokens, kept_tokens, sequences, got 'tokens'"
    with pytest.raises(ValueError, match=message):
        known_divisor("tokens", [make_batch(2)])
