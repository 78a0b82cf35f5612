"""AntiSD (arXiv 2605.11609): GRPO's advantage less a penalty on what a hint alone makes likely, behind a gate."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import expected_over_samples, jensen_shannon, make_case

from opd_lightning.callbacks.entropy_gate import EntropyGate
from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.methods import AntiSelfDistillation
from opd_lightning.methods.antisd import information_penalty
from opd_lightning.objectives import SampledTokenObjective


def group_of(marks):
    ids = torch.arange(2)
    return [
        Rollout(Problem("a", ()), ids, ids, torch.zeros(2), True, seed=seed, reward=mark)
        for seed, mark in enumerate(marks)
    ]


def test_the_penalty_is_0_at_0_with_slope_sigmoid_over_2_and_bounded_below():
    u = torch.linspace(-50, 50, 101, dtype=torch.float64, requires_grad=True)
    penalty = information_penalty(u)
    (slope,) = torch.autograd.grad(penalty.sum(), u)
    torch.testing.assert_close(slope, u.detach().sigmoid() / 2)
    assert float(penalty.detach()[50]) == pytest.approx(0, abs=1e-15)
    assert float(penalty.detach().min()) >= -math.log(2) / 2 - 1e-12


class PenaltyOnly(AntiSelfDistillation):
    """Without the part that the marks make."""

    def __call__(self, rewards, student_logits, teacher, tokens):
        extras = {"group_advantage": torch.zeros_like(rewards)}
        return super().__call__(rewards, student_logits, teacher, replace(tokens, extras=extras))


def test_the_expected_push_is_up_the_jensen_shannon_divergence():
    case = make_case()
    pushed = SampledTokenObjective(importance=None, advantage=PenaltyOnly(weight=1.0))
    logits = case.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(jensen_shannon(0.5)(logits.softmax(-1), case.q).sum(), logits)
    torch.testing.assert_close(expected_over_samples(case, pushed, case.p.log()), -gradient)  # a loss: descent goes up


def test_without_a_hint_it_is_grpo():
    advantage = AntiSelfDistillation()
    [shaped] = advantage.shape([group_of([1.0, 0.0, 0.0, 0.0])])
    expected = [1.5, -0.5, -0.5, -0.5]  # 3/4 and -1/4 over the deviation with n - 1 under the root, 1/2
    assert [rollout.extras["group_advantage"][0].item() for rollout in shaped] == pytest.approx(expected)
    case = make_case(n=2).agreeing()
    tokens = replace(case.tokens, extras=shaped[0].extras)
    given = advantage(torch.zeros(2, dtype=torch.float64), case.logits, case.scores(), tokens)
    assert given.tolist() == shaped[0].extras["group_advantage"].tolist()
    closed = AntiSelfDistillation()
    closed.gate = 0.0
    assert closed(torch.tensor([3.0, -2.0]), case.logits, case.scores(), tokens).tolist() == given.tolist()


def test_the_gate_has_three_rules_after_its_warm_up():
    gate = EntropyGate(warm_up=2)
    assert gate.gate == 0
    seen = []
    for median in [1.0, 3.0, 1.9, 2.0, 1.87, 1.85, 1.99, 2.5]:  # the reference is 2, and 0.93 of it 1.86
        gate.move(median)
        seen.append(gate.gate)
    assert seen == [0, 1, 1, 1, 1, 0, 0, 1]
    again = EntropyGate(warm_up=2)
    again.load_state_dict(gate.state_dict())
    again.move(1.0)
    assert (gate.gate, again.gate) == (1, 0)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: AntiSelfDistillation(-1), r"advantage\.weight: expected a number of at least 0"),
        (lambda: EntropyGate(warm_up=0), r"EntropyGate\.warm_up: expected an integer of at least 1"),
        (lambda: EntropyGate(close_below=2), r"EntropyGate\.close_below: expected a number in \(0, 1\]"),
        (lambda: EntropyGate().on_train_start(None, object()), r"EntropyGate: it opens the gate of AntiSelfDistill"),
        (lambda: AntiSelfDistillation().shape([group_of([1.0])]), r"data\.rollouts_per_prompt: .*Set it to 2 or more"),
    ],
)
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()
