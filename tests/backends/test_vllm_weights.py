"""What vLLM gets of the live student: names, shapes and values of a plain model folder; no vLLM needed."""

import json

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from safetensors.torch import load_file

from opd_lightning.backends.hf import HFStudent, LoraSettings
from opd_lightning.backends.vllm.weights import write_weights


def load_student(tmp_path, *, tied, lora_targets=None):
    folder = save_folder(tmp_path, make_model(tie_word_embeddings=tied, vocab_size=VOCAB_SIZE + 14), make_tokenizer())
    lora = None if lora_targets is None else LoraSettings(r=2, target_modules=lora_targets)
    student = HFStudent(str(folder), lora=lora)
    model = student.load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return student, model


@pytest.mark.parametrize("lora_targets", [None, ["q_proj", "down_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_the_exported_folder(tmp_path, tied, lora_targets):
    student, model = load_student(tmp_path / "source", tied=tied, lora_targets=lora_targets)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    student.save(model, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    weights = dict(student.named_weights(model, VOCAB_SIZE))
    assert weights.keys() == exported.keys()
    for name, tensor in weights.items():
        rows = VOCAB_SIZE if "embed_tokens" in name or "lm_head" in name else len(exported[name])
        assert torch.equal(tensor, exported[name][:rows]), name
    assert ("lm_head.weight" in weights) != tied
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_an_adapter_on_a_tied_head_parts_it_from_the_embedding(tmp_path):
    student, model = load_student(tmp_path / "source", tied=True, lora_targets=["lm_head"])
    weights = dict(student.named_weights(model, VOCAB_SIZE))
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    student.write_blank(model, tmp_path, VOCAB_SIZE)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_blank_model_has_the_tokenizers_rows(tmp_path, tied):
    student, model = load_student(tmp_path / "source", tied=tied, lora_targets=["q_proj"])
    student.write_blank(model, tmp_path, VOCAB_SIZE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == VOCAB_SIZE and config["tie_word_embeddings"] == tied
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["config.json"]
    assert model.config.vocab_size == VOCAB_SIZE + 14  # the live one is as it was


def test_without_a_vocabulary_size_padding_rows_stay(tmp_path):
    student, model = load_student(tmp_path, tied=True)
    assert len(dict(student.named_weights(model))["model.embed_tokens.weight"]) == VOCAB_SIZE + 14


def test_weights_go_through_a_file(tmp_path):
    weights = {"a": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.randn(6)[::2]}
    path = write_weights(iter(weights.items()), tmp_path, torch.bfloat16)
    read = load_file(path)
    assert torch.equal(read["a"], weights["a"].bfloat16()) and torch.equal(read["b"], weights["b"])
    assert torch.equal(read["c"], weights["c"].bfloat16())
    assert torch.equal(load_file(write_weights(iter(weights.items()), tmp_path))["a"], weights["a"])
