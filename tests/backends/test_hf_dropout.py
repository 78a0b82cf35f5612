"""The student trains without dropout unless it is asked for: what generated is what is trained."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from conftest import make_model, make_tokenizer, save_folder
from scoring import CPU
from torch import nn

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher, LoraSettings
from opd_lightning.backends.hf.dropout import RolloutDropout, verify_no_noise
from opd_lightning.interfaces import Problem, Prompt, Rollout, Sampling
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.comparison import compare, make_micro_batches

DROPPING = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "opt": {"dropout": 0.2, "attention_dropout": 0.2, "layerdrop": 0.4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3": {"attention_dropout": 0.4},
}


@pytest.fixture(params=DROPPING)
def folder(request, tmp_path):
    return save_folder(tmp_path, make_model(request.param, **DROPPING[request.param]), make_tokenizer())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora": LoraSettings(r=2)}], ids=str)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(folder, options):
    student, teacher = HFStudent(str(folder), **options), HFTeacher(str(folder))
    model = student.load()
    assert all(part.training for part in model.modules())
    teacher.setup(student, model, CPU)
    engine = HFEngine()
    engine.setup(student, CPU)
    engine.sync(model, 0)
    problem = Problem(uid="p", messages=(), answer="")
    prompts = [Prompt(problem, tuple(range(9, 9 + length)), (length, length + 1)) for length in (3, 8, 5)]
    rollouts = engine.generate(prompts, Sampling(max_new_tokens=12))
    batches = make_micro_batches(rollouts, max_tokens=64, pad_id=0, device=CPU)
    objective = DivergenceObjective()
    for compared in compare(student, model, batches, objective, teacher, objective.request(), facts_k=4):
        assert compared.losses.abs().max() < 1e-6
        assert compared.facts["rollout_mismatch"].abs().max() < 1e-4
        compared.losses.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4


def test_the_configuration_keeps_what_it_says(folder, tmp_path):
    student = HFStudent(str(folder))
    student.save(student.load(), tmp_path / "out")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    names = [name for name in before if "drop" in name]
    assert any(before[name] for name in names)
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


def test_a_model_that_is_noisy_in_training_otherwise_is_refused():
    model = make_model("qwen3")
    model.model.norm.register_forward_hook(
        lambda part, _, output: output + torch.randn_like(output) if part.training else output
    )
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"student\.path: Qwen3ForCausalLM says something else in training"):
        verify_no_noise(model, "student.path")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dropout_of_an_adapter_is_on_when_asked_for_and_said(tiny_qwen3_folder, tmp_path):
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(r=2, dropout=0.25))
    with pytest.warns(UserWarning, match=r"student\.lora\.dropout=0\.25: in training the policy is no longer quite"):
        model = student.load()
    assert any(isinstance(part, nn.Dropout) and part.p == 0.25 for part in model.modules())
    student.save(model, tmp_path / "adapter", merge_adapter=False)
    again = HFStudent(str(tiny_qwen3_folder), adapter_path=str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match=r"adapter_config\.json: lora_dropout=0\.25: in training"):
        again.load()


def rollout_of(uid, seed, ids, response):
    problem = Problem(uid=uid, messages=(), answer="")
    response = torch.tensor(response)
    return Rollout(problem, torch.tensor(ids), response, torch.zeros(len(response)), finished=False, seed=seed)


ROLLOUTS = [rollout_of("a", 1, [9, 10], [11, 12, 13]), rollout_of("a", 2, [9, 10], [11, 12, 13, 14, 15])]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_what_an_adapter_drops_is_a_function_of_step_rollout_and_position(tiny_qwen3_folder, gradient_checkpointing):
    lora = LoraSettings(r=2, dropout=0.5)
    student = HFStudent(str(tiny_qwen3_folder), lora=lora, gradient_checkpointing=gradient_checkpointing)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="dropout"):
        model = student.load()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()

    def states(rollouts, step=7, side="right"):
        torch.manual_seed(step)
        torch.rand(len(rollouts))  # how far the generator has run is of no matter
        return student.hidden_states(model, collate(rollouts, 0, side=side))

    def gradient(*batches):
        model.zero_grad()
        for batch in batches:
            states(batch).sin().sum().backward()  # not their squares, whose sum the last norm fixes
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # another mask changes them by about 1
    first, second = ROLLOUTS
    together = states(ROLLOUTS)
    for side in ("right", "left"):
        same(states([second, first], side=side)[5:], together[:3])
    same(torch.cat([states([first]), states([second])]), together)
    assert not torch.allclose(together[:3], together[3:6])  # another rollout of the same words
    assert not torch.allclose(states(ROLLOUTS, step=8), together)
    whole, in_parts = gradient(ROLLOUTS), gradient([second], [first])
    assert (whole - in_parts).norm() < 1e-4 * whole.norm()


def test_the_share_that_is_dropped_is_the_one_asked_for():
    dropout = RolloutDropout(0.25, "layer")
    dropout.seeds = torch.randint(2**62, (8, 16), generator=torch.Generator().manual_seed(0))
    dropped = dropout(torch.ones(8, 16, 64))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    for axis in (0, 1, 2):  # no token, position or channel is dropped for good
        assert float((dropped == 0).float().mean(axis).max()) < 1
    assert torch.equal(dropout(torch.ones(128, 64)).view(8, 16, 64), dropped)
    dropout.seeds = dropout.seeds[:, :4]  # experts that see some tokens only
    assert float((dropout(torch.ones(100, 64)) == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))
