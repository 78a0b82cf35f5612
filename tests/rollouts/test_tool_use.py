"""Responses of several turns on the real student of the sandbox: who wrote what, and who is trained on it."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from opd_lightning.backends.hf import HFEngine, HFStudent
from opd_lightning.interfaces import Sampling, StepPrompts
from opd_lightning.rollouts.answering import render_prompts
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.tool_use import Tool, ToolUse
from opd_lightning.sandbox.calculator import Calculator
from opd_lightning.tasks import ArithmeticTask


class Silent(Tool):
    """Can be called by no token that the student writes, or by none at all."""

    def __init__(self, *ids):
        self.ids = ids

    def call_ids(self, tokenizer):
        return self.ids

    def answer(self, problem, text, seed):
        raise AssertionError("never called")


@pytest.fixture(scope="module")
def live():
    spec = HFStudent("sandbox:student")
    told = []
    return SimpleNamespace(
        spec=spec,
        model=spec.load(),
        weight_version=0,
        autocast=nullcontext,
        announce=lambda rollout, step: told.append(rollout),
        told=told,
    )


@pytest.fixture(scope="module")
def helped(live):
    """Responses with a calculator that always answers."""
    return ask(ToolUse(Calculator()), live)


def ask(source, live, *, num_prompts=4, **sampling):
    engine = HFEngine()
    engine.setup(live.spec, torch.device("cpu"))
    source.setup(engine)
    problems = ArithmeticTask(num_train=8, num_validation=0, num_test=0).problems("train")[:num_prompts]
    positions = range(num_prompts)
    prompts = render_prompts(live.spec.tokenizer, problems, positions, num_samples=1, seed_parts=(0, "test"))
    settings = Sampling(**{"max_new_tokens": 64} | sampling)
    return source.rollouts(StepPrompts(0, tuple(positions), tuple(prompts)), settings, live).rollouts


def text_of(rollout, live, whose):
    mask = rollout.student_wrote if whose == "student" else ~rollout.student_wrote
    return live.spec.tokenizer.decode(rollout.response_ids[mask].tolist())


def test_the_calculator_writes_what_stands_behind_every_equals_sign(live, helped):
    assert live.told[: len(helped)] == helped
    for rollout in helped:
        steps = rollout.text.split("#")[0].split(";")[:-1]
        assert steps and all(eval(step.replace("=", "==")) for step in steps), rollout.text
        assert text_of(rollout, live, "tool") == "".join(step.split("=")[1] for step in steps)
        assert "=;" in text_of(rollout, live, "student") and rollout.finished
        assert bool(rollout.log_probs[rollout.student_wrote].isfinite().all())
        assert bool(rollout.log_probs[~rollout.student_wrote].isnan().all())


def test_only_what_the_student_wrote_is_trained_and_its_log_probabilities_are_those_of_the_whole(live, helped):
    batch = collate(helped, live.spec.tokenizer.pad_id)
    assert batch.num_tokens == sum(int(rollout.student_wrote.sum()) for rollout in helped)
    with torch.no_grad():
        logits = live.spec.head(live.model)(live.spec.hidden_states(live.model, batch))
    again = logits.log_softmax(-1).gather(-1, batch.tokens.ids[:, None]).squeeze(-1)
    torch.testing.assert_close(again, batch.tokens.rollout_log_probs, rtol=1e-4, atol=1e-4)


def same(one, other):
    return all(
        torch.equal(a.response_ids, b.response_ids) and a.text == b.text for a, b in zip(one, other, strict=True)
    )


def test_without_a_call_it_is_on_policy_bit_for_bit(live):
    plain, silent = ask(OnPolicy(), live), ask(ToolUse(Silent(0)), live)
    assert same(plain, silent)
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(plain, silent, strict=True))
    assert all(rollout.student_wrote is None for rollout in silent)
    assert same(ask(ToolUse(Calculator(), max_turns=1), live), plain)


def test_a_response_does_not_depend_on_the_others(live):
    assert same(ask(ToolUse(Calculator(0.5)), live)[:2], ask(ToolUse(Calculator(0.5)), live, num_prompts=2))


def test_all_turns_share_the_budget_and_a_cut_leaves_no_end(live):
    for most in (7, 8, 9):
        for rollout in ask(ToolUse(Calculator()), live, max_new_tokens=most):
            assert len(rollout.response_ids) == most and not rollout.finished


def test_a_calculator_out_of_order_leaves_the_work_to_the_student(live):
    tokenizer = live.spec.tokenizer
    (call,) = Calculator().call_ids(tokenizer)
    assert tokenizer.decode([call]) == "="
    assert Calculator().answer(None, "17+25=", 0) == "42"
    assert Calculator().answer(None, "17+25=42;42-8=", 0) == "34"
    assert Calculator().answer(None, "17+25", 0) is None
    assert Calculator().answer(None, "#=", 0) is None
    out = [Calculator(0.25).answer(None, "1+1=", seed) is None for seed in range(2000)]
    assert math.isclose(sum(out) / 2000, 0.25, abs_tol=0.04)
    assert all(rollout.student_wrote is None for rollout in ask(ToolUse(Calculator(1.0)), live))


def test_settings_are_checked(live):
    with pytest.raises(ValueError, match=r"data\.source\.tool: no token of the student's can end a call of Silent"):
        ask(ToolUse(Silent()), live)
    with pytest.raises(ValueError, match=r"tool\.failure_rate: expected a share from 0 to 1, got 2"):
        Calculator(2)
    with pytest.raises(ValueError, match=r"data\.source\.max_turns"):
        ToolUse(Calculator(), max_turns=0)
