"""Means, their errors, and the AUROC, against the obvious way to compute them."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollouts_by_hand import make_rollout

from opd_lightning.diagnosis.estimates import answer_facts, auroc, estimate_mean
from opd_lightning.diagnosis.measurements import Estimate


def test_one_value_per_group_gives_the_ordinary_standard_error():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    found = estimate_mean([[value] for value in values])
    assert found.value == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_values_of_a_group_that_always_agree_count_once():
    single = estimate_mean([[0.0], [1.0], [1.0]])
    assert estimate_mean([[0.0] * 4, [1.0] * 4, [], [1.0] * 4]) == single


def test_the_margin_is_honest_where_nothing_varies_and_where_nothing_is_known():
    assert estimate_mean([[1.0]] * 60).margin == pytest.approx(3 / 60)
    assert estimate_mean([[1.0, 0.0]]).margin == math.inf
    assert Estimate(0.5, 0.1, 9).lower == pytest.approx(0.3)


few = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 3.0]), min_size=1, max_size=6)


@given(few, few)
def test_auroc_is_the_share_of_pairs_in_order(positive, negative):
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_auroc_needs_both_kinds():
    assert auroc([], [1.0]) is None and auroc([1.0], []) is None


def test_what_answers_say():
    groups = [
        [make_rollout([1, 2, 3], reward=1.0), make_rollout([1] * 9, reward=0.0, finished=False)],
        [make_rollout([1, 2], reward=0.5), make_rollout([4], reward=0.0)],
    ]
    facts = answer_facts(groups)
    assert facts.accuracy is not None and facts.accuracy.value == pytest.approx(1.5 / 4)
    assert facts.mixed_prompts == 0.5
    assert (facts.response_length, facts.truncation_rate) == (15 / 4, 0.25)
    assert facts.repetition_rate == pytest.approx(0.5 / 4)  # nine equal tokens: two 8-grams, one of them new


def test_without_marks_there_is_no_accuracy():
    facts = answer_facts([[make_rollout([1])], [make_rollout([2])]])
    assert facts.accuracy is None and facts.mixed_prompts is None
