"""Drawing one token per row: distribution, cuts, log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from opd_lightning.interfaces import Sampling
from opd_lightning.randomness import hashed_uniforms
from opd_lightning.rollouts.sampling import draw_tokens


def logits_of(num_tokens: int, seed: int = 0, spread: float = 1.5) -> torch.Tensor:
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(seed)) * spread


def cut_reference(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities after temperature, top-k and top-p, token by token in float64."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()[: sampling.top_k or None]
    total, mass, kept = sum(float(probabilities[i]) for i in order), 0.0, []
    for token in order:
        if mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += float(probabilities[token])
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept] / mass
    return result


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7, top_k=5),
    Sampling(top_p=0.7),
    Sampling(temperature=0.8, top_k=9, top_p=0.8),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
    Sampling(top_k=500),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_follow_the_cut_distribution(sampling):
    num_draws = 40_000
    logits = logits_of(24)
    uniforms = hashed_uniforms(torch.arange(num_draws), 3)
    tokens, _ = draw_tokens(logits.repeat(num_draws, 1), uniforms, sampling)
    expected = cut_reference(logits, sampling) * num_draws
    counts = torch.bincount(tokens, minlength=24).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = float(((counts - expected) ** 2 / expected)[possible].sum())
    freedom = int(possible.sum()) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom) + 1e-9


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_log_probs_are_those_of_the_whole_tempered_distribution(sampling):
    logits = torch.stack([logits_of(40, seed) for seed in range(30)])
    tokens, log_probs = draw_tokens(logits.clone(), hashed_uniforms(torch.arange(30), 0), sampling)
    expected = (logits.double() / sampling.temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, atol=2e-6, rtol=0)


def test_greedy_takes_the_likeliest_at_temperature_one():
    logits = torch.stack([logits_of(40, seed) for seed in range(30)])
    tokens, log_probs = draw_tokens(
        logits.clone(), torch.full((30,), 0.999, dtype=torch.float64), Sampling(temperature=0)
    )
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).amax(-1), atol=1e-6, rtol=0)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    st.integers(0, 2**48 - 1),
    st.sampled_from(SETTINGS),
)
@example([-5.960464477539063e-08, 0.0], 0, Sampling(top_k=1))
def test_the_token_is_the_one_whose_interval_holds_the_uniform_number(values, numerator, sampling):
    logits = torch.tensor(values)
    uniform = (numerator + 0.5) * 2.0**-48
    token, _ = draw_tokens(logits[None].clone(), torch.tensor([uniform], dtype=torch.float64), sampling)
    probabilities = (logits / sampling.temperature).softmax(-1).double()
    threshold = cut_reference(logits, sampling)
    last = probabilities[threshold > 0].amin()
    near = (probabilities - last).abs() < 1e-5 * last
    assume(len(logits[near].unique()) == 1)  # of two that differ by rounding either may be the last one kept
    probabilities = probabilities.masked_fill(probabilities < last * (1 - 1e-5), 0)  # ties are kept together
    cumulative = probabilities.cumsum(-1) / probabilities.sum()
    chosen = int(token)
    assert probabilities[chosen] > 0
    assert cumulative[chosen] > uniform - 1e-5
    assert chosen == 0 or cumulative[chosen - 1] < uniform + 1e-5


@pytest.mark.parametrize("uniform", [0.5 * 2.0**-48, 1 - 0.5 * 2.0**-48])
def test_tokens_of_probability_zero_are_never_drawn(uniform):
    logits = torch.full((1, 9), -torch.inf)
    logits[0, 4] = 0.0
    token, log_prob = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert token.item() == 4
    assert log_prob.item() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=3, top_p=0.5)], ids=str)
def test_bad_logits_show_in_their_own_row_only(bad, sampling):
    logits = torch.stack([logits_of(8), logits_of(8, seed=1)])
    logits[0, 5] = bad
    tokens, log_probs = draw_tokens(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), sampling)
    assert bool(((tokens >= 0) & (tokens < 8)).all())
    assert log_probs.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 1000])
def test_sums_of_groups_find_the_token_that_cumulative_sums_find(num_tokens):
    logits = torch.stack([logits_of(num_tokens, seed, spread=4.0) for seed in range(200)])
    logits[::2, num_tokens // 2 :] = -torch.inf if num_tokens > 1 else 0.0  # whole groups without weight
    uniforms = hashed_uniforms(torch.arange(200), 0)
    uniforms[:50], uniforms[50:100] = 0.5 * 2.0**-48, 1 - 0.5 * 2.0**-48
    cumulative = logits.double().softmax(-1).cumsum(-1)
    at = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    tokens, log_probs = draw_tokens(logits.clone(), uniforms, Sampling())
    inside = (uniforms > 1e-6) & (uniforms < 1 - 1e-6)  # beyond, rounding decides which of the last ones it is
    assert torch.equal(tokens[inside], at[inside])
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=0)


def test_a_draw_takes_no_memory_of_the_size_of_the_vocabulary():
    logits, uniforms = torch.zeros(4, 20_000), torch.full((4,), 0.5, dtype=torch.float64)
    draw_tokens(logits.clone(), uniforms, Sampling())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        draw_tokens(logits, uniforms, Sampling())
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events()) < logits.numel()
