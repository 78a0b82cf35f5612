"""Body and head of well-known architectures reproduce the whole model; what does not is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model

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
