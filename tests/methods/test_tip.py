"""TIP (arXiv 2604.14084): the tokens with the largest s = h + d - h d, of each response so many."""

import math

import pytest
import torch
from weighed import trained, weigh

from opd_lightning.methods import TIP
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.comparison import Comparison
from opd_lightning.training.first_look import look_first
from opd_lightning.training.metrics import Means


def random_step(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        trained({name: torch.rand(n, generator=generator) ** 3 for name in TIP.reads}, seed=i)
        for i, n in enumerate(lengths)
    ]


def kept(weighting, step):
    return [each.trained_positions.tolist() for each in weighting.look(step)]


def reference(step, share):
    """The obvious one: sort, clip at the top 2 %, scale, combine, take the best."""
    columns = []
    for name in TIP.reads:
        everything = sorted(value for each in step for value in each.facts[name].tolist())
        top = everything[math.ceil(0.98 * len(everything)) - 1]
        scale = lambda value, low=everything[0], top=top: (min(value, top) - low) / (top - low)  # noqa: E731
        columns.append([[scale(value) for value in each.facts[name].tolist()] for each in step])
    chosen = []
    for h, d in zip(*columns, strict=True):
        scores = [1 - (1 - a) * (1 - b) for a, b in zip(h, d, strict=True)]
        best = sorted(range(len(scores)), key=lambda t: -scores[t])[: max(1, math.floor(share * len(scores)))]
        chosen.append(sorted(best))
    return chosen


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_best_of_each_response_are_kept_and_exactly_so_many(share):
    step = random_step(30, 1, 11, 60)
    found = kept(TIP(share), step)
    assert found == reference(step, share)
    assert [len(each) for each in found] == [max(1, math.floor(share * n)) for n in (30, 1, 11, 60)]


@pytest.mark.parametrize("choice", ["best", "drawn"])
def test_a_response_of_which_nothing_is_trained_is_left_so(choice):
    step = random_step(6, 0, 4)
    micro_batch = collate([each.rollout for each in step], 0)
    facts = {name: torch.cat([each.facts[name] for each in step]) for name in TIP.reads}
    rollouts, seen = look_first(TIP(0.5, choice), iter([Comparison(micro_batch, torch.zeros(10), facts)]), Means())
    assert [len(each.trained_positions) for each in rollouts] == [3, 0, 2] and len(seen) == 3


def test_all_of_it_is_plain_distillation():
    step = random_step(5, 3)
    for choice in ("best", "drawn"):
        assert kept(TIP(1.0, choice), step) == [list(range(5)), list(range(3))]
    assert weigh(TIP(1.0), *step) == [[1] * 5, [1] * 3]


def test_where_nothing_diverges_the_entropy_decides_and_of_equals_the_earlier():
    one = trained({"student_entropy": [0.1, 0.9, 0.2, 0.8], "reverse_kl": [0.0] * 4})
    assert kept(TIP(0.5), [one]) == [[1, 3]]
    assert kept(TIP(0.5), [trained(dict.fromkeys(TIP.reads, [0.0] * 4))]) == [[0, 1]]


def test_words_of_a_tool_are_never_kept():
    response = trained({"student_entropy": [0.0, 1.0], "reverse_kl": [0.0, 1.0]}, own=[True, False, False, True])
    assert kept(TIP(0.5), [response]) == [[3]]


@pytest.mark.slow
def test_drawn_tokens_follow_their_weights_and_the_seed():
    weights = torch.tensor([1.0, 2.0, 5.0])
    facts = {"student_entropy": weights, "reverse_kl": torch.ones(3)}
    drawn = [kept(TIP(0.34, "drawn"), [trained(facts, seed=seed)])[0][0] for seed in range(2000)]
    shares = [drawn.count(t) / 2000 for t in range(3)]
    assert shares == pytest.approx((weights / 8).tolist(), abs=0.04)
    assert kept(TIP(0.34, "drawn"), [trained(facts, seed=3)]) == [[drawn[3]]]
    both = TIP(0.34, "drawn", entropy_power=0.0, divergence_power=1.0)
    certain = trained({"student_entropy": [5.0, 5.0, 0.0], "reverse_kl": [0.0, 0.0, 1.0]})
    assert kept(both, [certain]) == [[2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"token_weighting\.share: expected a number above 0 and at most 1, got 0"),
        ({"choice": "worst"}, r"token_weighting\.choice: expected one of best, drawn, got 'worst'"),
        ({"clip": 1.0}, r"token_weighting\.clip: expected a share from 0 to below 1"),
        ({"entropy_power": -1.0}, r"token_weighting\.entropy_power: expected a finite number of at least 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TIP(**settings)
