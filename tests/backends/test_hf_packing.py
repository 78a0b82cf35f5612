"""Rollouts laid end to end: hidden states, losses and gradients are those of padded ones, or the model is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from scoring import CPU
from test_hf_student import make_batch, train_adapter

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher, LoraSettings
from opd_lightning.backends.hf.packing import allow_packing, is_packed, response_states
from opd_lightning.interfaces import Problem, Prompt, Sampling
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.comparison import compare
from opd_lightning.training.metrics import comparison_statistics

EXPERTS = {"num_experts_per_tok": 2}
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0},  # alternates windows; eager, as SDPA has no cap
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {},
    "gpt2": {},  # learns its positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16} | EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 4} | EXPERTS,  # sinks
}
LENGTHS = ((3, 5), (6, 2), (1, 9), (2, 14), (1, 1))


def states_and_gradients(model, batch, packed):
    states = response_states(model, batch, packed)
    states.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"states": states.detach()} | gradients


def check_equal(packed, padded, **tolerances):
    assert packed.keys() == padded.keys()
    for name, tensor in padded.items():
        torch.testing.assert_close(packed[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


IN_FLOAT32 = ("gemma2", "qwen3_moe", "gpt_oss")  # experts and eager attention know no float64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_and_gradients_are_those_of_padded_rollouts(name):
    model = make_model(name, **ARCHITECTURES[name])
    # rotations are computed in float32 whatever the model is in
    tolerances = {"rtol": 1e-3, "atol": 1e-4} if name in IN_FLOAT32 else {"rtol": 1e-6, "atol": 1e-6}
    model = model if name in IN_FLOAT32 else model.double()
    batch, other_side = make_batch(LENGTHS)[1], make_batch(LENGTHS, "left")[1]
    padded = states_and_gradients(model, batch, False)
    allow_packing(model, True, "student")
    assert [is_packed(model, packing) for packing in (None, True, False)] == [True, True, False]
    packed = states_and_gradients(model, batch, True)
    check_equal(packed, padded, **tolerances)
    check_equal(states_and_gradients(model, other_side, True), packed, rtol=0, atol=0)
    check_equal(states_and_gradients(model, batch, False), padded, rtol=0, atol=0)  # the detour changes nothing


def make_groups():
    """Two prompts: three rollouts of one, two of the other, in mixed order."""
    rollouts, _ = make_batch(((4, 5), (6, 2), (4, 9), (4, 14), (6, 1)))
    prompts = {len(rollout.prompt_ids): rollout.prompt_ids for rollout in rollouts}
    return collate([replace(r, prompt_ids=prompts[len(r.prompt_ids)]) for r in rollouts], 0)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2", "mistral"])
def test_a_prompt_is_computed_once_for_its_rollouts(name):
    model = make_model(name, **ARCHITECTURES[name])
    tolerances = {"rtol": 1e-3, "atol": 1e-4} if name in IN_FLOAT32 else {"rtol": 1e-6, "atol": 1e-5}
    model = model if name in IN_FLOAT32 else model.double()
    batch = make_groups()
    padded = states_and_gradients(model, batch, False)
    allow_packing(model, True, "student")
    widths = []
    model.get_input_embeddings().register_forward_hook(lambda *parts: widths.append(parts[1][0].numel()))
    check_equal(states_and_gradients(model, batch, True), padded, **tolerances)
    assert widths == [4 + 6 + 31]  # both prompts, all responses


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_what_flash_attention_is_told_is_enough(name):
    model = make_model(name, **ARCHITECTURES[name]).double()
    batch = make_batch(LENGTHS)[1]
    expected = states_and_gradients(model, batch, False)
    model.set_attn_implementation("opd_packed_by_bounds")
    allow_packing(model, True, "student")
    check_equal(states_and_gradients(model, batch, True), expected, rtol=1e-6, atol=1e-6)


UNFIT = {
    "mamba": ({}, "a rollout sees the one before it"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "a rollout sees the one before it"),
    "bloom": ({"n_head": 4}, "its attention cannot be replaced"),
    "llama": ({"attn_implementation": "flex_attention"}, "attention 'flex_attention' has no such mode: use 'sdpa'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_are_padded_or_refused_with_the_reason(name):
    options, reason = UNFIT[name]
    model = make_model(name, **options)
    implementation = model.config._attn_implementation
    with pytest.warns(UserWarning, match=rf"teacher\.packing: .* cannot be laid end to end \({reason}.* are padded"):
        allow_packing(model, None, "teacher")
    assert not is_packed(model, None)
    assert model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match=rf"student\.packing: .*{reason}.* Leave the setting out"):
        allow_packing(model, True, "student")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allow_packing(model, False, "student")


def distill(packing, **options):
    """One backward pass of the sandbox pair, in float64."""
    student = HFStudent("sandbox:student", packing=packing, **options)
    teacher = HFTeacher("sandbox:teacher", dtype="float64", packing=packing)
    model = student.load().double()
    train_adapter(model)
    teacher.setup(student, model, CPU)
    rollouts = make_groups().rollouts
    rollouts = [
        replace(r, prompt_ids=r.prompt_ids % 40, response_ids=r.response_ids % 40, log_probs=r.log_probs.double())
        for r in rollouts
    ]
    objective = DivergenceObjective()
    torch.manual_seed(3)
    (compared,) = compare(student, model, [collate(rollouts, 0)], objective, teacher, objective.request(), facts_k=4)
    compared.losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    share, total = comparison_statistics([compared])[0]["padding_share"]
    return compared, gradients, float(share / total)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"gradient_checkpointing": True}, id="whole, recomputed", marks=pytest.mark.slow),
        pytest.param({"lora": LoraSettings(r=4, dropout=0.3)}, id="adapter with dropout"),
    ],
)
@pytest.mark.filterwarnings("ignore:student.lora.dropout")
def test_losses_facts_and_gradients_of_the_sandbox_are_those_of_padded_rollouts(options):
    packed, packed_gradients, packed_share = distill(True, **options)
    padded, padded_gradients, padded_share = distill(False, **options)
    assert packed_share == 0.0
    assert padded_share == pytest.approx(1 - 55 / 90)
    torch.testing.assert_close(packed.losses, padded.losses, rtol=1e-5, atol=1e-6)
    check_equal(packed.facts, padded.facts, rtol=1e-4, atol=1e-5, equal_nan=True)
    check_equal(packed_gradients, padded_gradients, rtol=1e-4, atol=1e-5)


def test_a_student_that_may_be_packed_generates_and_is_saved_as_before(tiny_qwen3_folder, tmp_path):
    answers, configurations = [], []
    for packing in (True, False):
        student = HFStudent(str(tiny_qwen3_folder), packing=packing)
        model = student.load()
        engine = HFEngine()
        engine.setup(student, CPU)
        engine.sync(model, 0)
        problem = Problem(uid="p", messages=(), answer="")
        prompts = [Prompt(problem, tuple(range(9, 9 + length)), (length, length + 1)) for length in (3, 8)]
        answers.append(engine.generate(prompts, Sampling(max_new_tokens=12)))
        student.save(model, tmp_path / str(packing))
        configurations.append((tmp_path / str(packing) / "config.json").read_text())
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one.response_ids, other.response_ids)
        assert torch.equal(one.log_probs, other.log_probs)
    assert configurations[0] == configurations[1]
