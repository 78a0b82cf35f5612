"""ExOPD (arXiv 2602.12125): beyond the teacher, seen from a reference."""

import pytest
import torch
from fixed_teacher import Fixed
from objective_cases import make_case

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import DivergenceObjective, SampledTokenObjective
from opd_lightning.teachers import ExtrapolatedTeacher

TEACHER = "the teacher itself"


def teacher_log_probs(case):
    return case.teacher_logits.log_softmax(-1)


def scores(case, reference, scale, **settings):
    teacher = Fixed(teacher_log_probs(case), case.response_ids)
    other = Fixed(teacher_log_probs(case) if reference is TEACHER else reference.log(), case.response_ids)
    return ExtrapolatedTeacher(teacher, other, scale, **settings).score(None, ScoreRequest())


def gradient(case, objective, teacher):
    logits = case.logits.clone().requires_grad_()
    return torch.autograd.grad(objective.token_losses(logits, teacher, case.tokens).sum(), logits)[0]


REFERENCE = make_case(5).p


def test_the_advantage_is_that_of_the_paper():
    case = make_case()
    sampled = case.response_ids[:, None]
    log_q, log_p, log_r = (each.log().gather(-1, sampled).squeeze(-1) for each in (case.q, case.p, REFERENCE))
    shown = SampledTokenObjective().advantages(case.logits, scores(case, REFERENCE, 1.25), case.tokens)
    torch.testing.assert_close(shown, (log_q - log_p) + 0.25 * (log_q - log_r))
    torch.testing.assert_close(shown, 1.25 * (log_q - log_r) - (log_p - log_r))
    pulled = SampledTokenObjective().advantages(case.logits, scores(case, REFERENCE, 0.0), case.tokens)
    torch.testing.assert_close(pulled, log_r - log_p)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_scale_of_1_or_the_teacher_as_reference_is_plain_distillation(normalized):
    case, objective = make_case(), SampledTokenObjective()
    plain = case.gradient(objective)
    exact = {"rtol": 0, "atol": 0} if not normalized else {}  # another softmax of what is normalised already
    torch.testing.assert_close(
        gradient(case, objective, scores(case, REFERENCE, 1.0, normalized=normalized)), plain, **exact
    )
    torch.testing.assert_close(
        gradient(case, objective, scores(case, TEACHER, 1.7, normalized=normalized)),
        plain,
        **exact,
    )


def test_the_fixed_point_is_where_every_advantage_is_the_same():
    case = make_case()
    target = case.q**1.25 * REFERENCE**-0.25
    target = target / target.sum(-1, keepdim=True)
    whole = scores(case, REFERENCE, 1.25, normalized=True)
    torch.testing.assert_close(whole.full().exp(), target)
    at_target = torch.stack(
        [
            ExtrapolatedTeacher(Fixed(case.q.log(), ids), Fixed(REFERENCE.log(), ids))
            .score(None, ScoreRequest())
            .sampled()
            - target.log()[:, token]
            for token, ids in enumerate(torch.arange(9)[:, None].expand(9, 4))
        ]
    )
    torch.testing.assert_close(at_target, at_target[:1].expand(9, 4))
    case.logits = target.log()
    flat = gradient(case, DivergenceObjective(), whole)
    torch.testing.assert_close(flat, torch.zeros_like(flat), atol=1e-13, rtol=0)


def test_normalised_or_not_the_expected_gradient_is_that_of_the_reverse_kl_from_the_extrapolation():
    case = make_case()
    expected = gradient(case, DivergenceObjective(), scores(case, REFERENCE, 1.25, normalized=True))
    for normalized in (False, True):
        total = torch.zeros_like(expected)
        for token in range(9):
            case.response_ids = torch.full((4,), token)
            pushed = gradient(
                case, SampledTokenObjective(importance=None), scores(case, REFERENCE, 1.25, normalized=normalized)
            )
            total += case.p[:, token, None] * pushed
        torch.testing.assert_close(total, expected)


def test_slices_offers_and_requests():
    case = make_case()
    for normalized in (False, True):
        whole = scores(case, REFERENCE, 1.25, normalized=normalized)
        torch.testing.assert_close(whole.slice(1, 3).sampled(), whole.sampled()[1:3])
    teacher, reference = Fixed(case.q.log(), case.response_ids), Fixed(REFERENCE.log(), case.response_ids)
    both = ExtrapolatedTeacher(teacher, reference)
    assert both.offer == ScoreRequest()
    both.score(None, ScoreRequest(temperature=2.0))
    assert teacher.asked == reference.asked == [ScoreRequest(temperature=2.0)]
    assert ExtrapolatedTeacher(teacher, reference, normalized=True).offer.full_vocabulary
    both.setup(None, None, None)
    assert reference.is_set_up


def test_mistakes():
    case = make_case()
    teacher = Fixed(case.q.log(), case.response_ids)
    few = Fixed(case.q.log(), case.response_ids, offer=ScoreRequest(top_k=20))
    with pytest.raises(ValueError, match=r"teacher\.reference: Fixed gives .*Set teacher\.normalized: false"):
        ExtrapolatedTeacher(teacher, few, normalized=True).preflight(None)
    with pytest.raises(ValueError, match=r"teacher\.scale: expected a finite number of at least 0"):
        ExtrapolatedTeacher(teacher, teacher, scale=-1)
    with pytest.raises(ValueError, match=r"teacher\.tail_ratio: the cap needs whole distributions"):
        ExtrapolatedTeacher(teacher, teacher, tail_ratio=2.0)
    with pytest.raises(ValueError, match=r"teacher\.tail_ratio: expected a finite number above 1"):
        ExtrapolatedTeacher(teacher, teacher, normalized=True, tail_ratio=1.0)
