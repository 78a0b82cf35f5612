"""EOPD (arXiv 2603.07079): the sampled token's gradient plus a gated forward KL on the teacher's top k."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import forward_kl, make_case, make_tokens

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.methods import EntropyAware
from opd_lightning.objectives import Clipped, SampledTokenObjective

BASE = SampledTokenObjective(importance=Clipped())


def entropies(case):
    return -(case.q * case.q.log()).sum(-1)


def test_without_any_open_gate_it_is_the_plain_policy_gradient():
    case = make_case()
    torch.testing.assert_close(case.losses(EntropyAware(threshold=math.inf)), case.losses(BASE), rtol=0, atol=0)
    torch.testing.assert_close(case.gradient(EntropyAware(threshold=math.inf)), case.gradient(BASE), rtol=0, atol=0)


def test_with_every_gate_open_and_the_whole_vocabulary_the_exact_forward_kl_is_added():
    case = make_case()
    open_gates = EntropyAware(k=9, threshold=0, weight=2.0)
    added = case.losses(open_gates) - case.losses(BASE)
    torch.testing.assert_close(added, 2 * forward_kl(case.p, case.q))
    torch.testing.assert_close(case.gradient(open_gates) - case.gradient(BASE), 2 * (case.p - case.q))


def test_the_gate_reads_the_teacher_only_and_the_student_is_not_renormalised():
    case = make_case(n=40, spread=1.0)
    threshold = entropies(case).median().item()
    objective = EntropyAware(k=3, threshold=threshold)
    values, ids = case.q.topk(3)
    inside = values / values.sum(-1, keepdim=True)
    cross = (inside * (inside.log() - case.p.log().gather(-1, ids))).sum(-1)
    torch.testing.assert_close(case.losses(objective) - case.losses(BASE), cross * (entropies(case) >= threshold))
    moved = replace(case, logits=case.logits.flip(0))
    is_open = (moved.losses(objective) - moved.losses(BASE)) != 0
    assert is_open.tolist() == (entropies(case) >= threshold).tolist()


def test_the_entropy_of_a_list_is_a_lower_bound():
    case = make_case(n=40, spread=1.0)
    top = case.q.topk(3).values
    bound = -(top * top.log()).sum(-1)
    assert (bound < entropies(case)).all()
    threshold = bound.median().item()
    added = case.losses(EntropyAware(k=3, threshold=threshold, entropy_from="top_k")) - case.losses(BASE)
    assert (added != 0).tolist() == (bound >= threshold).tolist()
    asked = EntropyAware(k=3, entropy_from="top_k").request()
    assert asked == ScoreRequest(top_k=3)
    assert EntropyAware(k=3).request() == ScoreRequest(top_k=3, full_vocabulary=True)


def test_no_tokens_no_loss():
    case = make_case(n=0)
    objective = EntropyAware(threshold=0)
    assert (
        objective.token_losses(case.logits, case.scores(), make_tokens(case.response_ids, torch.zeros(0))).numel() == 0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"objective\.k: expected an integer of at least 1"),
        ({"threshold": -1}, r"objective\.threshold: expected a number of at least 0"),
        ({"weight": math.nan}, r"objective\.weight: expected a number of at least 0"),
        ({"entropy_from": "student"}, r"objective\.entropy_from: expected one of vocabulary, top_k"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        EntropyAware(**settings)
