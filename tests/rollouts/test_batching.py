from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.objectives import NLL, DenseScores
from opd_lightning.rollouts.batching import collate, cut_by_tokens, sequence_length
from opd_lightning.rollouts.shaping import attach_log_ratios, attach_step, shape_groups
from opd_lightning.teachers import BaseModelTeacher


def make_rollout(prompt, response, seed=0, **options):
    return Rollout(
        problem=Problem(uid=f"p{seed}", messages=({"role": "user", "content": "?"},), answer="0"),
        prompt_ids=torch.tensor(prompt),
        response_ids=torch.tensor(response),
        log_probs=-torch.arange(1, len(response) + 1, dtype=torch.float32),
        finished=True,
        seed=seed,
        **options,
    )


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30)


@given(lengths, st.integers(18, 60))
def test_every_rollout_is_in_exactly_one_group_within_the_budget(sizes, budget):
    rollouts = [make_rollout([1] * p, [2] * t, seed=i) for i, (p, t) in enumerate(sizes)]
    groups = cut_by_tokens(rollouts, budget)
    assert sorted(r.seed for group in groups for r in group) == list(range(len(rollouts)))
    for group in groups:
        assert len(group) * max(map(sequence_length, group)) <= budget


@settings(max_examples=25)
@given(lengths, st.integers(18, 60))
def test_no_more_groups_than_needed_and_the_largest_as_small_as_can_be(sizes, budget):
    rollouts = [make_rollout([1] * p, [2] * t, seed=i) for i, (p, t) in enumerate(sizes)]
    groups = cut_by_tokens(rollouts, budget)
    longest = max(map(sequence_length, rollouts))
    largest = max(len(group) * max(map(sequence_length, group)) for group in groups)
    assert all(len(cut_by_tokens(rollouts, less)) > len(groups) for less in range(longest, largest))
    assert all(len(cut_by_tokens(rollouts, more)) == len(groups) for more in range(largest, budget + 1))


def test_longest_first_so_that_memory_runs_out_early_or_never():
    rollouts = [make_rollout([1], [2] * t) for t in (3, 9, 1, 5)]
    assert [sequence_length(r) for group in cut_by_tokens(rollouts, 10) for r in group] == [10, 6, 4, 2]


def test_a_sequence_beyond_the_budget_is_refused_by_name():
    with pytest.raises(ValueError, match=r"problem 'p7' alone has 12 tokens. Raise the budget to at least 12"):
        cut_by_tokens([make_rollout([1] * 4, [2] * 8, seed=7)], 11)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_points_at_the_positions_that_predict_the_response(side):
    rollouts = [make_rollout([5, 6, 7], [8, 9]), make_rollout([3], [4, 4, 1, 2])]
    batch = collate(rollouts, pad_id=0, side=side)
    following = batch.input_ids[batch.rows, batch.columns + 1]
    assert torch.equal(following, batch.tokens.ids)
    assert batch.tokens.ids.tolist() == [8, 9, 4, 4, 1, 2]
    assert batch.tokens.positions.tolist() == [0, 1, 0, 1, 2, 3]
    assert batch.tokens.rollout_log_probs.tolist() == [-1, -2, -1, -2, -3, -4]
    assert batch.rollouts == tuple(rollouts)
    for row, rollout in enumerate(rollouts):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
        assert batch.position_ids[row][real].tolist() == list(range(sequence_length(rollout)))


@pytest.mark.parametrize("nothing", [[], torch.tensor([])])  # float32, as torch makes empty tensors
def test_an_empty_response_has_a_prompt_and_no_tokens(nothing):
    batch = collate(
        [make_rollout([5, 6], [8]), replace(make_rollout([5, 7, 9], []), response_ids=torch.as_tensor(nothing))], 0
    )
    assert batch.tokens.ids.tolist() == [8] and batch.tokens.ids.dtype == torch.int64
    assert batch.input_ids.tolist() == [[5, 6, 8], [5, 7, 9]] and batch.rows.tolist() == [0]


def test_pad_id_may_equal_a_token_of_the_response():
    batch = collate([make_rollout([5], [9]), make_rollout([5], [6, 6, 9])], pad_id=9)
    assert batch.tokens.ids.tolist() == [9, 6, 6, 9]
    assert batch.attention_mask.sum() == 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_the_environment_are_read_but_never_trained_on(side):
    turns = torch.tensor([True, True, False, False, False, True])
    rollouts = [make_rollout([5, 6, 7], [10, 11, 12, 13, 14, 15], student_wrote=turns), make_rollout([3], [4, 1])]
    batch = collate(rollouts, pad_id=0, side=side)
    assert batch.tokens.ids.tolist() == [10, 11, 15, 4, 1]
    assert batch.tokens.positions.tolist() == [0, 1, 5, 0, 1]  # positions stay those in the response
    assert batch.tokens.rollout_log_probs.tolist() == [-1, -2, -6, -1, -2]
    assert batch.rows.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(batch.input_ids[batch.rows, batch.columns + 1], batch.tokens.ids)
    assert batch.input_ids[0][batch.attention_mask[0].bool()].tolist() == [5, 6, 7, 10, 11, 12, 13, 14, 15]
    assert [values.tolist() for values in batch.by_rollout(batch.tokens.positions)] == [[0, 1, 5], [0, 1]]


class Ranked(NLL):
    """Attaches to each token the rank of its response in its group, by reward, and how far it is from the end."""

    def shape(self, groups):
        return [[self.attach(rollout, group) for rollout in group] for group in groups]

    def attach(self, rollout, group):
        rank = sorted(other.reward for other in group).index(rollout.reward)
        length = len(rollout.response_ids)
        extras = {"rank": torch.full((length,), float(rank)), "left": torch.arange(length - 1.0, -1, -1)}
        return replace(rollout, extras=extras)


def test_what_an_objective_attaches_to_groups_reaches_its_tokens():
    hidden = torch.tensor([True, False, True])
    rollouts = [
        make_rollout([5], [6, 7, 8], seed=0, reward=0.5, student_wrote=hidden),
        make_rollout([5], [6], seed=1, reward=0.0),
        make_rollout([9], [6, 7], seed=2, reward=0.2),
        make_rollout([9], [8], seed=3, reward=1.0),
    ]
    shaped = shape_groups(Ranked(), rollouts, 2)
    assert [rollout.seed for rollout in shaped] == [0, 1, 2, 3]
    tokens = collate([shaped[3], shaped[0], shaped[2]], pad_id=0).tokens
    assert tokens.extras["rank"].tolist() == [1, 1, 1, 0, 0]
    assert tokens.extras["left"].tolist() == [0, 2, 0, 1, 0]
    assert tokens[1:3].extras["left"].tolist() == [2, 0]
    assert tokens.to("cpu").extras["left"].tolist() == [0, 2, 0, 1, 0]
    assert collate(rollouts, pad_id=0).tokens.extras == {}


def test_an_objective_that_loses_rollouts_is_refused():
    class Losing(NLL):
        def shape(self, groups):
            return [group[1:] for group in groups]

    rollouts = [make_rollout([5], [6], seed=i) for i in range(4)]
    with pytest.raises(ValueError, match=r"Losing\.shape must return the same rollouts in the same order"):
        shape_groups(Losing(), rollouts, 2)


def test_tokens_know_their_step():
    shaped = attach_step([make_rollout([5], [6, 7], seed=0)], 3)
    assert collate(shaped, pad_id=0).tokens.extras["step"].tolist() == [3, 3]


def test_log_ratios_are_attached_to_whole_rollouts_however_they_are_cut():
    hidden = torch.tensor([True, False, True])
    rollouts = [
        replace(
            make_rollout([5], [1, 2, 3], seed=0, student_wrote=hidden), log_probs=torch.tensor([-1.0, torch.nan, -2])
        ),
        replace(make_rollout([5, 5, 5], [0, 1], seed=1), log_probs=torch.tensor([-0.5, -1.5])),
    ]

    def teacher(batch):
        return DenseScores(torch.arange(-8.0, 0).expand(batch.num_tokens, 8), batch.tokens.ids)  # log q(y) = y - 8

    for cut in ([[0, 1]], [[1], [0]]):
        batches = [collate([rollouts[place] for place in places], pad_id=0) for places in cut]
        attached = attach_log_ratios(rollouts, batches, [teacher(batch) for batch in batches])
        assert [r.extras["log_ratio"].tolist() for r in attached] == [[-6, 0, -3], [-7.5, -5.5]]
    # another model had a say in what was drawn, and none in what the student thinks of it
    mixed = replace(rollouts[1], extras={"student_log_prob": torch.tensor([-0.25, -3.0])})
    batch = collate([mixed], pad_id=0)
    [attached] = attach_log_ratios([mixed], [batch], [teacher(batch)])
    assert attached.extras["log_ratio"].tolist() == [-7.75, -4]


def test_a_teacher_that_loses_rollouts_is_refused():
    class Losing(BaseModelTeacher):
        def shape(self, groups):
            return groups[1:]

    rollouts = [make_rollout([5], [6], seed=i) for i in range(4)]
    with pytest.raises(ValueError, match=r"model\.teacher: Losing\.shape must return the same rollouts"):
        shape_groups(Losing(), rollouts, 2)


def test_groups_are_halved_until_there_are_as_many_as_another_process_has():
    rollouts = [make_rollout([1] * 5, [2] * 3, seed=i) for i in range(5)]
    for at_least, sizes in ((1, [5]), (3, [2, 1, 2]), (9, [1] * 5)):
        groups = cut_by_tokens(rollouts, 100, at_least)
        assert [len(group) for group in groups] == sizes
        assert [rollout.seed for group in groups for rollout in group] == list(range(5))
    assert cut_by_tokens([], 100, 3) == []
