"""Facts over all tokens, by position and of whole answers, by value."""

import math

import pytest
from rollouts_by_hand import compared

from opd_lightning.diagnosis.tokens import facts_by_position, global_reward, mean_facts, reward_auroc

NAN = math.nan
PAIR = [
    compared([1, 2, 3, 4, 5], 1.0, reverse_kl=[1.0, 2, 3, 4, 5], sampled_log_ratio=[0.0, 0, 0, 0, -5]),
    compared([1, 2], 0.0, reverse_kl=[3.0, NAN], sampled_log_ratio=[1.0, 3]),
]


def test_means_are_over_tokens_where_a_fact_is_defined():
    assert mean_facts(PAIR) == {"reverse_kl": pytest.approx(18 / 6), "sampled_log_ratio": pytest.approx(-1 / 7)}
    assert mean_facts([compared([1], entropy=[NAN])]) == {"entropy": None}


def test_bins_cover_the_longest_response():
    first, second, third = facts_by_position(PAIR, num_bins=3)
    assert [(each.first, each.last, each.num_tokens) for each in (first, second, third)] == [
        (0, 1, 4),
        (2, 3, 2),
        (4, 4, 1),
    ]
    assert first.facts["reverse_kl"] == pytest.approx(6 / 3)
    assert third.facts == {"reverse_kl": 5.0, "sampled_log_ratio": -5.0}
    assert len(facts_by_position(PAIR, num_bins=100)) == 5


def test_the_global_reward_is_a_mean_over_the_answer():
    assert [global_reward(each) for each in PAIR] == [1.0, -2.0]
    assert reward_auroc(PAIR) == (1.0, 1)
    assert reward_auroc([PAIR[0], compared([1], 0.0, sampled_log_ratio=[-7.0])]) == (0.0, 1)


def test_without_marks_or_without_both_kinds_there_is_none():
    assert reward_auroc([compared([1], sampled_log_ratio=[0.0])]) == (None, None)
    assert reward_auroc(PAIR[:1]) == (None, 1)
