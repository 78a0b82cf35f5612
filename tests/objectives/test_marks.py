"""What the marks of a prompt's answers become when they are compared with one another."""

import pytest
import torch

from opd_lightning.objectives.marks import group_advantages


def test_they_sum_to_0_and_are_exactly_0_where_all_marks_are_the_same():
    marks = torch.tensor([0.1, 0.7, 1.0, 0.0], dtype=torch.float64)
    assert group_advantages(marks, scaled=False).tolist() == pytest.approx([-0.35, 0.25, 0.55, -0.45])
    scaled = group_advantages(marks)
    assert float(scaled.sum()) == pytest.approx(0, abs=1e-12)
    assert float(scaled.square().sum()) == pytest.approx(len(marks) - 1)  # their deviation is 1
    for scale in (False, True):
        assert group_advantages(torch.full((3,), 0.1), scale).tolist() == [0, 0, 0]
