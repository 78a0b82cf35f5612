"""Generation in fixed shapes: the tokens of the loop that drops rows."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model, make_tokenizer, save_folder
from test_hf_engine import NEVER, PROMPTS, assert_same, make_engine, make_prompt

from opd_lightning.backends.hf import HFStudent, LoraSettings
from opd_lightning.interfaces import Prompt, Sampling

MANY = [make_prompt(length, num_seeds=1 + i % 3, name=2) for i, length in enumerate([6, 2, 13, 9, 6])]


def make_student(tmp_path, **options):
    return HFStudent(str(save_folder(tmp_path, make_model(seed=3), make_tokenizer())), dtype="float64", **options)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=40, temperature=0.9),
        Sampling(max_new_tokens=21, temperature=0),
        Sampling(max_new_tokens=20, top_k=5, top_p=0.9, stop_ids=[]),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_loop_that_drops_rows(tmp_path, sampling):
    student = make_student(tmp_path, lora=LoraSettings(r=2) if sampling.temperature else None)
    model = student.load()
    expected = make_engine(student, model).generate(MANY, sampling)
    engine = make_engine(student, model, max_batch_size=4, static_shapes=True)  # the last batch is filled up
    assert_same(engine.generate(MANY, sampling), expected)
    even = [Prompt(p.problem, p.token_ids[:2], p.seeds) for p in MANY]  # no padding, and what is kept is used again
    assert_same(engine.generate(even, sampling), make_engine(student, model).generate(even, sampling))
    assert_same(engine.generate(MANY, sampling), expected, atol=1e-5)


def test_under_autocast_the_fixed_cache_has_its_dtype(tmp_path):
    student = HFStudent(str(save_folder(tmp_path, make_model(seed=3), make_tokenizer())))
    model = student.load()
    sampling = Sampling(max_new_tokens=8, stop_ids=NEVER)
    engine = make_engine(student, model, max_batch_size=8, static_shapes=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.generate(PROMPTS, sampling)
    assert {layer.keys.dtype for layer in engine._static._tables.cache.layers} == {torch.bfloat16}
    exact = make_engine(student, model).generate(PROMPTS, sampling)
    assert_same(engine.generate(PROMPTS, sampling), exact, atol=1e-4)  # and out of it that of the weights


def test_broken_weights_are_reported_with_their_row(tmp_path):
    student = make_student(tmp_path)
    model = student.load()
    engine = make_engine(student, model, max_batch_size=8, static_shapes=True)
    sampling = Sampling(max_new_tokens=4)
    before = engine.generate(PROMPTS, sampling)
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="not finite at response token 0 of problem 'p/1/5'"):
            engine.generate(PROMPTS, sampling)
        assert torch.equal(model.lm_head.weight, weight)
        model.model.layers[0].self_attn.v_proj.weight.copy_(
            make_student(tmp_path / "again").load().model.layers[0].self_attn.v_proj.weight
        )
    assert_same(engine.generate(PROMPTS, sampling), before)  # nothing of it is left in the cache


def test_what_cannot_be_run_in_fixed_shapes_is_refused(tmp_path, monkeypatch):
    student = make_student(tmp_path)
    windows = make_model("gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(ValueError, match=r"engine\.static_shapes: .* \(Gemma3TextConfig\) has layers with windows"):
        make_engine(student, windows, static_shapes=True)
    model = student.load()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=r"engine\.static_shapes: .*, got 'flash_attention_2'\. Set student\.attn_imp"):
        make_engine(student, model, static_shapes=True)
