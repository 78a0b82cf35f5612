import math

import pytest
import torch
from objective_cases import make_case

from opd_lightning.objectives.candidate_weights import candidate_weights

MASK = torch.tensor([[True, False, True], [True, True, True], [False, False, False], [True, False, False]])


def expected_weights(case, weighting, scale):
    raw = {"student_probability": case.p, "teacher_probability": case.q, "uniform": torch.ones_like(case.p)}[weighting]
    raw = raw[:, :3] * MASK
    return raw if scale == "raw" else torch.nan_to_num(raw / raw.sum(-1, keepdim=True))


@pytest.mark.parametrize("scale", ["normalized", "raw"])
@pytest.mark.parametrize("weighting", ["student_probability", "teacher_probability", "uniform"])
def test_weights_are_the_obvious_formula_and_detached(weighting, scale):
    case = make_case()
    student = case.p.log()[:, :3].requires_grad_()
    weights = candidate_weights(student, case.q.log()[:, :3], MASK, weighting, scale)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, expected_weights(case, weighting, scale))
    if scale == "normalized":
        assert weights.sum(-1).tolist() == pytest.approx([1, 1, 0, 1])


@pytest.mark.parametrize("scale", ["normalized", "raw"])
def test_impossible_candidates_weigh_nothing(scale):
    log_probs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    weights = candidate_weights(log_probs, log_probs, None, "student_probability", scale)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]]))
    excluded = torch.full((1, 3), -math.inf)
    assert candidate_weights(log_probs, excluded, None, "teacher_probability", scale).isfinite().all()
