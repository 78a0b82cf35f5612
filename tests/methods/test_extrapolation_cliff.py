"""The experimental cap after the extrapolation cliff (arXiv 2605.08737): our conjecture, exact for a coin."""

import math

import pytest
import torch
from fixed_teacher import Fixed

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.teachers import ExtrapolatedTeacher
from opd_lightning.teachers.extrapolated import largest_scale


def logit(p):
    return math.log(p / (1 - p))


def test_the_fixed_point_of_a_coin_and_its_cap():
    q, b = 0.98, 0.9
    ids = torch.tensor([0])
    pair = [torch.tensor([[p, 1 - p]], dtype=torch.float64).log() for p in (q, b)]

    def tail(scale, **settings):
        teacher = ExtrapolatedTeacher(Fixed(pair[0], ids), Fixed(pair[1], ids), scale, normalized=True, **settings)
        return float(teacher.score(None, ScoreRequest()).full()[0, 1].exp())

    assert [round(tail(scale), 4) for scale in (0, 1, 1.25, 1.5, 2)] == [0.1, 0.02, 0.0132, 0.0087, 0.0037]
    assert tail(5, tail_ratio=10.0) == pytest.approx((1 - b) / 10)
    assert tail(1.25, tail_ratio=10.0) == pytest.approx(tail(1.25))  # the cap is further out
    assert tail(5, tail_ratio=2.0) == pytest.approx(0.02)  # the teacher itself leaves less: it is not held back
    logs = torch.tensor([0.5, 0.95, 0.98, 0.999]).double().log()
    caps = largest_scale(logs, torch.full_like(logs, math.log(b)), 10.0)
    assert caps[0] == math.inf
    assert caps[1] > caps[2] > caps[3]
    assert float(caps[2]) == pytest.approx((logit(1 - 0.01) - logit(b)) / (logit(q) - logit(b)))
