import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.rollouts.batching import collate, cut_by_tokens, sequence_length


def make_rollout(prompt, response, seed=0):
    return Rollout(
        problem=Problem(uid=f"p{seed}", messages=({"role": "user", "content": "?"},), answer="0"),
        prompt_ids=torch.tensor(prompt),
        response_ids=torch.tensor(response),
        log_probs=-torch.arange(1, len(response) + 1, dtype=torch.float32),
        finished=True,
        seed=seed,
    )


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30)


@given(lengths, st.integers(18, 60))
def test_every_rollout_is_in_exactly_one_group_within_the_budget(sizes, budget):
    rollouts = [make_rollout([1] * p, [2] * t, seed=i) for i, (p, t) in enumerate(sizes)]
    groups = cut_by_tokens(rollouts, budget)
    assert sorted(r.seed for group in groups for r in group) == list(range(len(rollouts)))
    for group in groups:
        assert len(group) * max(map(sequence_length, group)) <= budget


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
    for row, rollout in enumerate(rollouts):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
        assert batch.position_ids[row][real].tolist() == list(range(sequence_length(rollout)))


def test_pad_id_may_equal_a_token_of_the_response():
    batch = collate([make_rollout([5], [9]), make_rollout([5], [6, 6, 9])], pad_id=9)
    assert batch.tokens.ids.tolist() == [9, 6, 6, 9]
    assert batch.attention_mask.sum() == 6
