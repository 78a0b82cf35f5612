"""SDPO (arXiv 2601.20802): who is shown what, whose tokens count, and the importance ratio."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import make_case
from scoring import make_batches

from opd_lightning.methods import DemonstratedOnly, PeerTeacher, SDPOObjective
from opd_lightning.objectives import DivergenceObjective, ForwardKL, JensenShannon, ReverseKL, StudentTopK
from opd_lightning.rollouts.batching import collate
from opd_lightning.teachers import BaseModelTeacher


def group(*rewards):
    _, (rollouts,) = make_batches()
    problem = replace(rollouts[0].problem, messages=({"role": "user", "content": "q"},))
    return [
        replace(rollout, problem=problem, reward=reward, text=f"text {place}", seed=place)
        for place, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=False))
    ]


def shown(*rewards, **options):
    (shaped,) = PeerTeacher(BaseModelTeacher(), solution="{solution}", **options).shape([group(*rewards)])
    return [rollout.context.get("demonstration") for rollout in shaped]


def test_the_first_success_is_shown_and_feedback_to_failures():
    assert shown(0.0, 1.0, 1.0) == ["text 1"] * 3
    assert shown(0.0, 1.0, 1.0, own_success=False) == ["text 1", "text 2", "text 1"]
    assert shown(0.0, 1.0, 0.5, own_success=False) == ["text 1", None, "text 1"]
    assert shown(0.0, 0.6, 0.5) == [None] * 3
    assert shown(0.0, 0.6, 0.5, success=0.5) == ["text 1"] * 3
    told = {"feedback": "{response} got {reward}"}
    assert shown(0.0, 1.0, math.nan, **told) == ["text 1\n\ntext 0 got 0", "text 1", "text 1"]
    assert shown(0.5, 0.0, math.nan, **told) == ["text 0 got 0.5", "text 1 got 0", None]


def test_answers_without_a_demonstration_weigh_exactly_nothing():
    (shaped,) = PeerTeacher(BaseModelTeacher()).shape([group(0.0, 1.0, 0.0)])
    batch = collate([shaped[0], replace(shaped[1], context={}), shaped[2]], 0)
    weights = DemonstratedOnly()({}, batch)
    assert weights.tolist() == [1.0] * 5 + [0.0] * 2 + [1.0] * 9
    none = collate([replace(rollout, context={}) for rollout in shaped], 0)
    assert not DemonstratedOnly()({}, none).any()


def test_the_whole_vocabulary_has_no_tail_and_both_ends_are_kls():
    case = make_case()
    for beta, divergence in ((0.5, JensenShannon(0.5)), (0.0, ForwardKL()), (1.0, ReverseKL())):
        mine = SDPOObjective(StudentTopK(9, "tail"), JensenShannon(beta), importance_cap=None)
        plain = DivergenceObjective(divergence=divergence)
        torch.testing.assert_close(case.losses(mine), case.losses(plain))
        torch.testing.assert_close(case.gradient(mine), case.gradient(plain))


def test_each_loss_is_multiplied_by_its_detached_and_capped_ratio():
    case = make_case()
    ratio = case.p.gather(-1, case.response_ids[:, None])[:, 0] / case.rollout_log_probs.exp()
    cap = float(ratio.median())
    assert 1 <= cap < ratio.max()
    with_ratio, plain = SDPOObjective(importance_cap=cap), SDPOObjective(importance_cap=None)
    torch.testing.assert_close(case.losses(with_ratio), ratio.clamp(max=cap) * case.losses(plain))
    torch.testing.assert_close(case.gradient(with_ratio), ratio.clamp(max=cap)[:, None] * case.gradient(plain))
    equal = case.agreeing()
    assert not case.gradient(plain).isnan().any() and equal.gradient(with_ratio).abs().max() < 1e-12


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"PeerTeacher shows successful answers, and the task marks none"):
        shown(math.nan, math.nan)
    with pytest.raises(ValueError, match=r"data\.rollouts_per_prompt: PeerTeacher shows one answer to the others"):
        shown(1.0)
    assert shown(0.0, feedback="{reward}") == ["0"]
    with pytest.raises(ValueError, match=r"model\.teacher\.template: expected \{demonstration\} somewhere in it"):
        PeerTeacher(BaseModelTeacher(), "{question}")
    with pytest.raises(ValueError, match=r"feedback: problem 'u' lacks a column that it names"):
        PeerTeacher(BaseModelTeacher(), feedback="{errors}").check_problems([group(0.0)[0].problem])
    with pytest.raises(ValueError, match=r"objective\.importance_cap: expected a finite number of at least 1"):
        SDPOObjective(importance_cap=0.5)
