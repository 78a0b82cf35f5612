import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import TOP_K, make_case, make_support, on_support, support_sets

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives.normalization import log1mexp, normalize, with_tail_slot
from opd_lightning.objectives.supports import look_up, same_tokens

seeds = st.integers(0, 10_000)


def select(case, support, k):
    return make_support(support, k, "tail").select(case.logits, case.scores(), case.response_ids)


@pytest.mark.parametrize("support", ["sampled_token", *TOP_K])
@given(seeds, st.integers(1, 12))
@settings(max_examples=30)
def test_open_slots_hold_each_token_of_the_set_once_with_the_teachers_log_prob(support, seed, k):
    case = make_case(seed)
    candidates = select(case, support, k)
    mask = torch.ones_like(candidates.ids, dtype=torch.bool) if candidates.mask is None else candidates.mask
    for row, expected in enumerate(support_sets(case, support, k)):
        tokens = candidates.ids[row][mask[row]].tolist()
        assert sorted(tokens) == sorted(expected)
    torch.testing.assert_close(candidates.teacher_log_probs[mask], case.q.log().gather(-1, candidates.ids)[mask])


def test_the_full_vocabulary_keeps_the_teachers_matrix():
    case = make_case()
    candidates = select(case, "full_vocabulary", 3)
    assert candidates.ids is None
    assert candidates.mask is None
    assert torch.equal(candidates.teacher_log_probs, case.scores().full())


def test_disjoint_top_lists_leave_an_empty_intersection():
    case = make_case()
    case.teacher_logits = -case.logits
    assert not select(case, "intersection", 3).mask.any()
    assert select(case, "union", 3).mask.all()
    assert select(case, "symmetric_difference", 3).mask.all()


def test_equal_top_lists_leave_an_empty_symmetric_difference():
    case = make_case()
    case.teacher_logits = 2 * case.logits
    assert not select(case, "symmetric_difference", 3).mask.any()
    assert select(case, "intersection", 3).mask.all()
    assert select(case, "union", 3).mask.sum() == 3 * 4


def test_selecting_carries_no_gradient():
    case = make_case()
    case.logits.requires_grad_()
    assert not select(case, "union", 3).teacher_log_probs.requires_grad


def test_looking_up_finds_tokens_wherever_the_other_list_has_them():
    found, mask = look_up(torch.tensor([[1, 2, 4]]), torch.tensor([[2, 3, 1]]), torch.tensor([[-0.1, -0.2, -0.3]]))
    assert mask.tolist() == [[True, True, False]]
    torch.testing.assert_close(found, torch.tensor([[-0.3, -0.1, -math.inf]]))


def test_same_tokens_compares_all_pairs():
    same = same_tokens(torch.tensor([[1, 2]]), torch.tensor([[2, 3, 1]]))
    assert same.tolist() == [[[False, False, True], [True, False, False]]]


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        ("sampled_token", ScoreRequest(temperature=0.5)),
        ("student_top_k", ScoreRequest(arbitrary_ids=True, temperature=0.5)),
        ("teacher_top_k", ScoreRequest(top_k=7, temperature=0.5)),
        ("intersection", ScoreRequest(top_k=7, temperature=0.5)),
        ("union", ScoreRequest(top_k=7, arbitrary_ids=True, temperature=0.5)),
        ("symmetric_difference", ScoreRequest(top_k=7, arbitrary_ids=True, temperature=0.5)),
        ("full_vocabulary", ScoreRequest(full_vocabulary=True, temperature=0.5)),
    ],
)
def test_each_support_asks_the_teacher_for_no_more_than_it_needs(support, expected):
    assert make_support(support, 7).request(0.5) == expected


@pytest.mark.parametrize("support", ["sampled_token", *TOP_K])
@pytest.mark.parametrize("normalization", ["renormalize", "tail", "none"])
@given(seeds, st.integers(1, 8))
@settings(max_examples=20)
def test_normalisation_is_the_obvious_formula(support, normalization, seed, k):
    case = make_case(seed)
    candidates = select(case, support, k)
    mask = torch.ones_like(candidates.ids, dtype=torch.bool) if candidates.mask is None else candidates.mask
    normalized = normalize(candidates.teacher_log_probs, candidates.mask, normalization)
    open_slots = with_tail_slot(mask) if normalization == "tail" else mask
    for row, tokens in enumerate(support_sets(case, support, k)):
        if not tokens or (normalization == "tail" and len(tokens) == case.q.shape[-1]):
            continue
        order = candidates.ids[row][mask[row]].argsort()
        if normalization == "tail":
            order = torch.cat([order, torch.tensor([len(order)])])
        result = normalized[row][open_slots[row]].exp()[order]
        torch.testing.assert_close(result, on_support(case.q[row], tokens, normalization))


@given(seeds, st.integers(1, 9), st.floats(0.1, 30))
def test_masses_with_tail_sum_to_one(seed, k, spread):
    case = make_case(seed, spread=spread)
    top = case.p.log().topk(k).values
    for log_probs in (top, top.float()):
        mass = normalize(log_probs, None, "tail").exp().sum(-1)
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=4 * torch.finfo(mass.dtype).eps, rtol=0)


def test_the_tail_of_all_but_one_token_is_that_token():
    case = make_case()
    log_q = case.q.log()
    torch.testing.assert_close(normalize(log_q[:, :-1], None, "tail"), log_q)


def test_an_empty_row_is_finite_and_its_tail_holds_everything():
    log_probs = torch.full((1, 3), -1.0, requires_grad=True)
    closed = torch.zeros(1, 3, dtype=torch.bool)
    tail = normalize(log_probs, closed, "tail")
    assert tail[0, -1] == 0
    assert normalize(log_probs, closed, "renormalize").isfinite().all()
    tail[0, -1].backward()
    assert (log_probs.grad == 0).all()


def test_renormalising_candidates_the_teacher_excludes_spreads_it_over_the_open_ones():
    log_probs = torch.tensor([[-math.inf, -math.inf, -0.1]])
    result = normalize(log_probs, torch.tensor([[True, True, False]]), "renormalize")
    torch.testing.assert_close(result[0, :2].exp(), torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("x", [-1e-12, -1e-6, -0.1, -math.log(2), -1.0, -20.0, -300.0])
def test_log1mexp_is_accurate_on_both_sides(x):
    expected = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    torch.testing.assert_close(log1mexp(torch.tensor(x, dtype=torch.float64)).item(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_survives_mass_rounded_to_one_or_above(dtype):
    x = torch.tensor([0.0, 3e-7, -1e-30, -5000.0], dtype=dtype, requires_grad=True)
    result = log1mexp(x)
    result.sum().backward()
    assert result.isfinite().all()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(result[0].exp(), torch.tensor(torch.finfo(dtype).eps, dtype=dtype))


def test_gradients_of_the_tail_pass_finite_differences():
    case = make_case(n=2, vocabulary=6)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ids = torch.tensor([[0, 3, 2], [5, 1, 2]])
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: normalize(z.log_softmax(-1).gather(-1, ids), mask, "tail")[:, [0, 1, 3]], logits
    )
