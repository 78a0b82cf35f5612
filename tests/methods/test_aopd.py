"""AOPD (arXiv 2605.06387): forward KL on the teacher's top k where the advantage is negative."""

import torch
from objective_cases import make_case

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.methods import ForwardKLWhereNegative
from opd_lightning.objectives import DivergenceObjective, ForwardKL, FullVocabulary, SampledTokenObjective, TeacherTopK


def test_each_token_gets_one_of_both_losses():
    case = make_case(n=40)
    rewards = (case.q / case.p).log()[range(40), case.response_ids]
    is_negative = rewards < 0
    assert 0 < is_negative.sum() < 40
    covering, pushing = DivergenceObjective(TeacherTopK(3), ForwardKL()), SampledTokenObjective()
    objective = ForwardKLWhereNegative(TeacherTopK(3))
    torch.testing.assert_close(
        case.losses(objective), torch.where(is_negative, case.losses(covering), case.losses(pushing))
    )
    torch.testing.assert_close(
        case.gradient(objective), torch.where(is_negative[:, None], case.gradient(covering), case.gradient(pushing))
    )


def test_a_student_that_equals_its_teacher_learns_nothing():
    case = make_case().agreeing()
    for support in (TeacherTopK(3), TeacherTopK(3, normalization="tail"), FullVocabulary()):
        gradient = case.gradient(ForwardKLWhereNegative(support))
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)


def test_it_asks_for_what_either_part_needs():
    assert ForwardKLWhereNegative(TeacherTopK(7), teacher_temperature=2.0).request() == ScoreRequest(
        top_k=7, temperature=2.0
    )
    assert ForwardKLWhereNegative(FullVocabulary()).request() == ScoreRequest(full_vocabulary=True)
