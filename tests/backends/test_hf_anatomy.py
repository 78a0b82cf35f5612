"""Body and head of well-known architectures reproduce the whole model; what does not is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB_SIZE, make_model
from peft import LoraConfig, get_peft_model

from opd_lightning.backends.hf.anatomy import body_states, linear_head, verify_anatomy

ARCHITECTURES = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_of_body_is_the_model(name):
    model = make_model(name, **ARCHITECTURES[name])
    verify_anatomy(model, "student.path", generates=True)
    ids = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    mask, positions = torch.ones_like(ids), torch.arange(9).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        states = body_states(model, ids, mask, positions)
        logits = linear_head(model, 70)(states.flatten(0, 1))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.flatten(0, 1)[:, :70])


# ------------------------------------------------------------------------------------------------ the head as data

HEADS = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},  # has a bias
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma2": {"final_logit_softcapping": 5.0, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_against_float64(name):
    model = make_model(name, **HEADS[name])
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    ids, positions = torch.arange(9, 18)[None], torch.arange(9)[None]
    with torch.no_grad():
        single = linear_head(model, 70)(body_states(model, ids, None, positions)[0])
        expected = model.double()(input_ids=ids).logits[0, :, :70].double()
        double = linear_head(model, 70)
        torch.testing.assert_close(double(body_states(model, ids, None, positions)[0]), expected, atol=1e-5, rtol=1e-5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)
    assert (double.bias is not None) == (name == "phi")
    tied = model.get_input_embeddings().weight is head.weight
    assert tied == HEADS[name].get("tie_word_embeddings", False)


def lora_on_the_head(model, **options):
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_equals_pefts_forward_and_is_trained(tied):
    model = lora_on_the_head(make_model(tie_word_embeddings=tied)).double()
    layer = model.get_base_model().lm_head
    states = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2
    gradients = []
    for logits in (layer(states), linear_head(model, VOCAB_SIZE)(states)):
        gradients.append(torch.autograd.grad(logits.square().sum(), list(trained.values())))
    torch.testing.assert_close(linear_head(model, VOCAB_SIZE)(states), layer(states))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other)
    with model.disable_adapter():
        assert linear_head(model, VOCAB_SIZE).weight is layer.base_layer.weight


def test_an_adapter_on_a_bfloat16_head_keeps_its_dtype():
    model = lora_on_the_head(make_model().bfloat16())
    head = linear_head(model, VOCAB_SIZE)
    assert head.weight.dtype == torch.bfloat16  # peft keeps the adapter in float32
    states = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = model.get_base_model().lm_head(states).float()
    torch.testing.assert_close(head(states), expected, atol=0.5, rtol=0.05)


def quantise(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    return model


def replace_head(model):
    model.lm_head = torch.nn.Bilinear(32, 32, VOCAB_SIZE)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantise(make_model()), r"is a Linear with torch\.int8 weights; .*llm_int8_skip_modules: \[lm_head\]"),
        (lambda: replace_head(make_model()), r"is a Bilinear with torch\.float32 weights; expected a linear layer"),
        (lambda: lora_on_the_head(make_model(), use_dora=True), r"adapter on the head .* low-rank update \(DoRA"),
        (
            lambda: lora_on_the_head(make_model("phi", num_key_value_heads=4), lora_bias=True),
            r"low-rank update \(DoRA, a",
        ),
    ],
    ids=["quantised", "other layer", "DoRA", "bias"],
)
def test_unusual_heads_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=rf"student\.path: the .*{message}") as caught:
        verify_anatomy(make(), "student.path", generates=True)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- the whole model


def test_left_padding_does_not_change_a_row():
    model = make_model("qwen3")
    ids = torch.arange(20, 26)[None]
    padded = torch.nn.functional.pad(ids, (4, 0), value=0)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    positions = torch.tensor([[0] * 4 + list(range(6))])
    with torch.no_grad():
        alone = body_states(model, ids, None, torch.arange(6)[None])
        within = body_states(model, padded, mask, positions)[:, 4:]
    torch.testing.assert_close(within, alone, atol=1e-5, rtol=1e-5)


def test_a_model_that_does_more_after_its_head_is_refused():
    model = make_model("granite", logits_scaling=3.0)
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match=r"student\.path: GraniteForCausalLM is not supported: its logits are not"):
        verify_anatomy(model, "student.path", generates=True)


def test_a_model_that_ignores_positions_is_refused():
    model = make_model("gpt2")
    body_forward = model.transformer.forward
    model.transformer.forward = lambda *args, **kwargs: body_forward(*args, **(kwargs | {"position_ids": None}))
    with pytest.raises(ValueError, match=r"teacher\.path: .* left padding changes its output"):
        verify_anatomy(model, "teacher.path", generates=True)


def test_a_model_without_attention_is_refused():
    model = make_model("mamba", hidden_size=32, state_size=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"student\.path: MambaForCausalLM .* decoder-only model with attention"):
        verify_anatomy(model, "student.path", generates=True)


def test_checking_leaves_mode_and_random_state_alone():
    model = make_model("qwen3", attention_dropout=0.5)
    model.train()
    model.model.norm.eval()
    state = torch.get_rng_state()
    verify_anatomy(model, "student.path", generates=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training
