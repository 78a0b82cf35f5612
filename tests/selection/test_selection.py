import io
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.interfaces import Problem, PromptOutcome, PromptSelector
from opd_lightning.selection import DifficultyPool, Filtered, InOrder, Mixture, Shuffled, Weighted


def make_problems(num_problems, num_sources=1):
    return [
        Problem(
            uid=f"p{i}",
            messages=({"role": "user", "content": "?" * (i + 1)},),
            answer="1",
            source="abc"[i % num_sources],
            columns={"level": i % 4, "meta": {"language": "en" if i % 2 else "de"}},
        )
        for i in range(num_problems)
    ]


def start(selector, num_problems=20, seed=0, num_sources=1):
    selector.setup(make_problems(num_problems, num_sources), seed)
    return selector


def reward(index, step):
    """Four rollouts whose mean depends on the prompt and drifts with the step."""
    return tuple(float((index * 7 + step * sample) % 5 < 2 + index % 3) for sample in range(4))


def run(selector, steps, batch_size=6):
    """Select and observe for some steps, as training does."""
    batches = []
    for step in steps:
        batch = selector.select(batch_size)
        selector.observe([PromptOutcome(index, reward(index, step)) for index in batch])
        batches.append(batch)
    return batches


def through_a_checkpoint(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SELECTORS = {
    "in_order": InOrder,
    "shuffled": Shuffled,
    "mixture": lambda: Mixture({"a": 2, "b": 1, "c": 0.5}),
    "filtered": lambda: Filtered(where={"level": [0, 1, 3]}),
    "filtered_pool": lambda: Filtered(DifficultyPool(), max_prompt_characters=17),
    "pool": DifficultyPool,
    "weighted": lambda: Weighted("level", least=0.5),
}
each_selector = pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)


@each_selector
@pytest.mark.parametrize("crash_at", [0, 1, 5, 13])
def test_resumed_draws_equal_uninterrupted_draws(make, crash_at):
    uninterrupted = run(start(make(), num_sources=3, seed=4), range(30))
    crashed = start(make(), num_sources=3, seed=4)
    run(crashed, range(crash_at))
    state = through_a_checkpoint(crashed.state_dict())
    run(crashed, range(crash_at, crash_at + 2))
    resumed = start(make(), num_sources=3, seed=4)
    resumed.load_state_dict(state)
    assert run(resumed, range(crash_at, 30)) == uninterrupted[crash_at:]
    resumed.load_state_dict(state)
    assert run(resumed, range(crash_at, 30)) == uninterrupted[crash_at:], "the state is not changed by going on from it"


@each_selector
def test_two_processes_draw_the_same_and_disturb_no_global_generator(make):
    torch.manual_seed(1)
    first = run(start(make(), num_sources=3), range(5))
    before = torch.get_rng_state()
    assert run(start(make(), num_sources=3), range(5)) == first
    assert torch.equal(torch.get_rng_state(), before)


@each_selector
def test_state_of_other_data_is_refused(make):
    state = run_state(start(make(), num_problems=20, num_sources=3))
    with pytest.raises(ValueError, match=r"written with 20 training problems, this run has 24.*same data"):
        start(make(), num_problems=24, num_sources=3).load_state_dict(state)


def run_state(selector):
    run(selector, range(2))
    return selector.state_dict()


def test_in_order_goes_round():
    selector = start(InOrder(), 5)
    assert selector.select(3) + selector.select(4) == [0, 1, 2, 3, 4, 0, 1]
    assert selector.select(0) == []
    assert selector.select(12) == [2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]


@settings(deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(0, 70), max_size=6), st.integers(0, 5))
def test_shuffled_is_one_stream_of_whole_permutations_however_it_is_cut(num_problems, sizes, seed):
    in_pieces = start(Shuffled(), num_problems, seed)
    stream = list(itertools.chain.from_iterable(in_pieces.select(size) for size in sizes))
    assert stream == start(Shuffled(), num_problems, seed).select(sum(sizes))
    for begin in range(0, len(stream) - num_problems + 1, num_problems):
        assert sorted(stream[begin : begin + num_problems]) == list(range(num_problems))
    assert in_pieces.state_dict() == {"num_problems": num_problems, "position": sum(sizes)}


def test_shuffled_orders_differ_between_passes_and_seeds():
    one, other = start(Shuffled(), 50, seed=0), start(Shuffled(), 50, seed=1)
    passes = [tuple(one.select(50)) for _ in range(4)] + [tuple(other.select(50))]
    assert len(set(passes)) == 5
    assert tuple(range(50)) not in passes


@pytest.mark.parametrize(
    ("make", "epoch_length"),
    [(InOrder, 20), (Shuffled, 20), (SELECTORS["mixture"], 20), (SELECTORS["filtered"], 15), (DifficultyPool, 20)],
)
def test_epoch_length(make, epoch_length):
    assert start(make(), num_sources=3).epoch_length == epoch_length


def test_a_source_with_weight_zero_is_left_out():
    selector = start(Mixture({"a": 1, "b": 0, "c": 1}), num_sources=3)
    assert selector.epoch_length == 13
    assert all(index % 3 != 1 for index in selector.select(200))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), st.integers(0, 1000))
def test_mixture_keeps_its_shares_at_every_moment(weights, seed):
    selector = start(Mixture(dict(zip("abc", weights, strict=True))), 30, seed, num_sources=3)
    counts = [0, 0, 0]
    for num_draws in range(1, 1001):
        (index,) = selector.select(1)
        counts[index % 3] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - num_draws * weight / sum(weights)) < 5


def test_mixture_passes_over_each_source_whole():
    selector = start(Mixture({"a": 3, "b": 1}), 20, num_sources=2)
    draws = selector.select(400)
    for source in (0, 1):
        own = [index for index in draws if index % 2 == source]
        for begin in range(0, len(own) - 9, 10):
            assert sorted(own[begin : begin + 10]) == list(range(source, 20, 2))


def test_mixture_is_one_stream_and_gives_both_of_two_ranks_every_source():
    whole = start(Mixture({"a": 1, "b": 1}), 20, num_sources=2).select(64)
    in_pieces = start(Mixture({"a": 1, "b": 1}), 20, num_sources=2)
    assert [index for size in (1, 30, 33) for index in in_pieces.select(size)] == whole
    for rank in range(2):
        assert 8 <= sum(index % 2 for index in whole[rank::2]) <= 24


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "math": 1}, r"'math' is not a source\. The data has the sources: a, b\."),
        ({"a": 1}, r"'b' has no weight \(0 drops it\)\. The data has the sources: a, b\."),
    ],
)
def test_mixture_names_must_fit_the_data(weights, message):
    with pytest.raises(ValueError, match=message):
        start(Mixture(weights), num_sources=2)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": math.nan}, {"a": math.inf}])
def test_mixture_weights_must_be_shares(weights):
    with pytest.raises(
        ValueError, match=r"selector\.weights: expected numbers of at least 0 by source name, one of them"
    ):
        Mixture(weights)


def test_mixture_state_of_other_sources_is_refused():
    state = run_state(start(Mixture({"a": 1, "b": 1}), num_sources=2))
    with pytest.raises(ValueError, match=r"the checkpoint mixes a, b, this run a\. Resume with the same sources"):
        start(Mixture({"a": 1, "b": 0}), num_sources=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"where": {"level": 1}}, [1, 5, 9, 13, 17]),
        ({"where": {"level": {">": 0, "<": 2}}}, [1, 5, 9, 13, 17]),
        ({"where": {"level": ["0", 2], "meta.language": "de"}, "max_prompt_characters": 8}, [0, 2, 4, 6]),
        ({}, list(range(20))),
    ],
)
def test_filtered_passes_over_what_is_left(filters, kept):
    selector = start(Filtered(InOrder(), **filters))
    assert selector.select(2 * len(kept)) == kept * 2


def test_filtered_tells_the_inner_selector_its_own_indices():
    inner = DifficultyPool()
    selector = start(Filtered(inner, where={"level": 3}))
    selector.observe([PromptOutcome(7, (1.0, 0.0))])
    assert inner.state_dict()["right"].tolist() == [0, 1, 0, 0, 0]
    assert selector.metrics() == inner.metrics()


def test_filters_that_leave_nothing_say_what_there_is():
    with pytest.raises(
        ValueError, match=r"none of the 20 problems\. Columns: level, meta; .*'level': \['0', '1', '2', '3'\]"
    ):
        start(Filtered(where={"level": 9}))
    with pytest.raises(ValueError, match=r"selector\.max_prompt_characters: expected an integer of at least 1, got 0"):
        Filtered(max_prompt_characters=0)


def test_pool_prefers_prompts_answered_right_sometimes():
    """Prompts 0..9 never right, 10..19 always, 20..29 sometimes: after one look at each, only the last come often."""
    selector = start(DifficultyPool(exploration=0.2), 30)
    drawn = Counter()
    for step in range(110):
        batch = selector.select(10)
        assert len(set(batch)) == 10
        rates = [0.0 if index < 10 else 1.0 if index < 20 else 0.5 for index in batch]
        selector.observe([PromptOutcome(index, (rate, rate)) for index, rate in zip(batch, rates, strict=True)])
        if step >= 10:
            drawn.update(batch)
    middle = sum(drawn[index] for index in range(20, 30))
    assert middle >= 800
    assert all(drawn[index] for index in range(30)), "the others are looked at again"
    assert min(drawn[index] for index in range(20, 30)) > 60
    assert selector.metrics() == pytest.approx({"pool_share": 1 / 3, "unseen_share": 0, "pass_rate": 0.5})


def test_pool_begins_by_looking_at_everything():
    selector = start(DifficultyPool(), 40)
    batches = [selector.select(8) for _ in range(5)]
    assert sorted(itertools.chain(*batches)) == list(range(40))
    assert selector.metrics() == {"pool_share": 0.0, "unseen_share": 1.0}


def test_exploration_share_is_exact_over_any_stretch():
    selector = start(DifficultyPool(exploration=0.3), 1000)
    selector.observe([PromptOutcome(index, (0.0, 1.0)) for index in range(500)])
    selector.observe([PromptOutcome(index, (0.0, 0.0)) for index in range(500, 1000)])
    explored = 0
    for step in range(1, 40):
        batch = selector.select(7)
        explored = selector.state_dict()["stream"]["position"]
        assert len(batch) == 7
        assert explored >= math.floor(7 * step * 0.3)
    assert explored < 7 * 39 * 0.3 + 12  # a prompt that is in the batch already is passed over


def test_pool_follows_the_student():
    selector = start(DifficultyPool(low=0.2, high=0.8, exploration=0, decay=0.5), 1)
    rates = []
    for rewards in [(0.0,) * 4, (1.0,) * 4, (1.0,) * 4, (1.0,) * 4]:
        selector.observe([PromptOutcome(0, rewards)])
        rates.append(selector.metrics()["pass_rate"])
    assert rates == pytest.approx([0, 4 / 6, 6 / 7, 7 / 7.5])
    assert selector.metrics()["pool_share"] == 0


@pytest.mark.parametrize("num_problems", [1, 3])
def test_pool_repeats_prompts_only_when_there_are_too_few(num_problems):
    selector = start(DifficultyPool(), num_problems)
    selector.observe([PromptOutcome(0, (0.0, 1.0))])
    for _ in range(5):
        counts = Counter(selector.select(7))
        assert max(counts.values()) - min(counts[i] for i in range(num_problems)) <= 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"low": -0.1}, r"selector\.low: expected a number from 0 to 1, got -0\.1"),
        ({"exploration": 2}, r"selector\.exploration: expected a number from 0 to 1, got 2"),
        ({"decay": math.nan}, r"selector\.decay: expected a number from 0 to 1, got nan"),
        ({"low": 0.5, "high": 0.5}, r"selector\.low: expected a number below selector\.high=0\.5, got 0\.5"),
    ],
)
def test_pool_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        DifficultyPool(**setting)


def test_pool_refuses_ungraded_rollouts():
    with pytest.raises(ValueError, match="DifficultyPool needs graded rollouts"):
        start(DifficultyPool()).observe([PromptOutcome(0, (math.nan,))])


def test_selectors_are_built_from_yaml():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptSelector, "selector")
    text = """
selector:
  class_path: Filtered
  init_args:
    where: {level: [1, 2]}
    inner: {class_path: DifficultyPool, init_args: {exploration: 0.5}}
"""
    selector = parser.instantiate(parser.parse_string(text)).selector
    assert isinstance(selector.inner, DifficultyPool)
    assert (selector.inner.exploration, selector.where) == (0.5, {"level": [1, 2]})
    arguments = parser.parse_args(["--selector=Mixture", "--selector.weights={a: 0.7, b: 0.3}"])
    assert parser.instantiate(arguments).selector.weights == {"a": 0.7, "b": 0.3}


def test_weighted_problems_come_as_often_as_their_weights_say():
    selector = start(Weighted("level"), 20)  # levels 0 to 3 of five problems each, so weights 0, 2/3, 4/3 and 2
    draws = Counter()
    for _ in range(300):
        one = Counter(selector.select(20))
        assert all(one[i] in (math.floor(i % 4 / 1.5), math.ceil(i % 4 / 1.5)) for i in range(20))
        draws += one
    assert all(draws[i] == pytest.approx(300 * (i % 4) / 1.5, rel=0.15) for i in range(20))
    even = start(Weighted("level", least=3.0), 20)
    passes = [even.select(20) for _ in range(3)]
    assert all(sorted(each) == list(range(20)) for each in passes) and passes[0] != passes[1]


def test_weights_that_are_none_or_have_changed_are_refused():
    with pytest.raises(ValueError, match=r"selector\.least: expected a number of at least 0 or null, got -1"):
        Weighted("level", least=-1)
    with pytest.raises(
        ValueError, match=r"a number of at least 0 in 'meta.language' of problem 'p0', got nothing; its"
    ):
        start(Weighted("meta.language"))
    with pytest.raises(ValueError, match=r"every weight in 'level' is 0. Set selector.least"):
        start(Weighted("level"), 1)
    state = run_state(start(Weighted("level")))
    with pytest.raises(ValueError, match=r"weights in 'level' are not those of the checkpoint"):
        start(Weighted("level", least=1)).load_state_dict(state)


def test_a_few_problems_are_named_or_drawn_with_the_seed():
    named = start(Filtered(InOrder(), uids=["p3", "p7"]))
    assert named.select(5) == [3, 7, 3, 7, 3]
    drawn = [sorted(set(start(Filtered(most=4), seed=seed).select(12))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(each) for each in drawn] == [4, 4, 4]
    assert start(Filtered(InOrder(), uids=["p3"], most=9)).select(2) == [3, 3]


def test_a_problem_that_does_not_exist_cannot_be_kept():
    with pytest.raises(ValueError, match=r"selector\.uids: 1 of 2 are no training problems, the first is 'p99'"):
        start(Filtered(uids=["p1", "p99"]))
    with pytest.raises(ValueError, match=r"selector\.most: "):
        Filtered(most=0)
