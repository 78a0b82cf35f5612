"""The student: loading, training mode, hidden states and logits, adapters, saving."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import END_OF_TEXT, END_OF_TURN, VOCAB_SIZE, make_model, make_tokenizer, save_folder
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd_lightning.backends.hf import HFStudent, LoraSettings
from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.rollouts.batching import collate


def make_batch(lengths=((3, 5), (6, 2), (1, 9)), side="right"):
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for i, (num_prompt, num_response) in enumerate(lengths):
        ids = torch.randint(7, VOCAB_SIZE, (num_prompt + num_response,), generator=generator)
        problem = Problem(uid=str(i), messages=(), answer="")
        rollouts.append(
            Rollout(problem, ids[:num_prompt], ids[num_prompt:], torch.zeros(num_response), finished=True, seed=i)
        )
    return rollouts, collate(rollouts, 0, side=side)


def train_adapter(model, seed: int = 0) -> None:
    """Give the adapter weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits_of(model, ids=None):
    ids = torch.arange(7, 27)[None] if ids is None else ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_construction_reads_nothing():
    student = HFStudent("/there/is/nothing/here", lora=LoraSettings(r=2), template_kwargs={"a": 1})
    assert student.describe()["init_args"]["path"] == "/there/is/nothing/here"


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, target_modules=["q_proj", "lm_head"])], ids=["whole", "lora"])
def test_logits_are_those_of_each_row_alone(tmp_path, architecture, side, lora):
    model = make_model(architecture, vocab_size=VOCAB_SIZE + 9)
    student = HFStudent(str(save_folder(tmp_path, model, make_tokenizer())), lora=lora)
    loaded = student.load()
    train_adapter(loaded)
    rollouts, batch = make_batch(side=side)
    logits = student.head(loaded)(student.hidden_states(loaded, batch))
    assert logits.shape == (batch.num_tokens, VOCAB_SIZE)
    assert logits.dtype == torch.float32
    expected = []
    for rollout in rollouts:
        whole = logits_of(loaded, torch.cat([rollout.prompt_ids, rollout.response_ids])[None])
        expected.append(whole[0, len(rollout.prompt_ids) - 1 : -1, :VOCAB_SIZE])
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_logits_are_float32_under_autocast(tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder))
    model = student.load()
    _, batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student.head(model)(student.hidden_states(model, batch))
    assert logits.dtype == torch.float32


def test_loaded_in_training_mode_with_all_weights_trained(tiny_qwen3_folder):
    model = HFStudent(str(tiny_qwen3_folder)).load()
    assert all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_attention_kernel_for_gpus_loads_on_a_cpu(tiny_qwen3_folder):
    def only_there(*_, **__):
        raise RuntimeError("this kernel needs a GPU")

    AttentionInterface.register("only_there", only_there)
    student = HFStudent(str(tiny_qwen3_folder), attn_implementation="only_there")
    model = student.load()
    assert model.config._attn_implementation == "only_there"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        student.hidden_states(model, make_batch()[1])


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(tiny_qwen3_folder):
    _, batch = make_batch()
    gradients, calls = [], []
    for checkpointing in (False, True):
        student = HFStudent(str(tiny_qwen3_folder), gradient_checkpointing=checkpointing)
        model = student.load()
        count = [0]
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        student.head(model)(student.hidden_states(model, batch)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_only_the_adapter_and_starts_at_the_base(tiny_qwen3_folder, checkpointing):
    base = HFStudent(str(tiny_qwen3_folder)).load()
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(r=4), gradient_checkpointing=checkpointing)
    model = student.load()
    assert model.training
    torch.testing.assert_close(logits_of(model), logits_of(base), atol=0, rtol=0)
    model.train()
    _, batch = make_batch()
    student.head(model)(student.hidden_states(model, batch)).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_lora_settings_reach_the_adapter(tiny_qwen3_folder):
    settings = LoraSettings(r=3, alpha=12.0, dropout=0.25, target_modules=["q_proj", "down_proj"])
    model = HFStudent(str(tiny_qwen3_folder), lora=settings).load()
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 3
    assert layer.scaling["default"] == 4.0
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.training
    assert not hasattr(model.get_base_model().model.layers[1].self_attn.k_proj, "lora_A")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4), LoraSettings(r=4, target_modules=["v_proj", "lm_head"])])
def test_a_saved_whole_model_loads_and_says_the_same(tmp_path, tied, lora):
    folder = save_folder(tmp_path / "source", make_model(tie_word_embeddings=tied), make_tokenizer())
    student = HFStudent(str(folder), lora=lora)
    model = student.load()
    train_adapter(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student.save(model, tmp_path / "out")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # merged out of place
    assert model.training
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # a server may be another user
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-4, rtol=1e-4)
    head_is_adapted = lora is not None and "lm_head" in lora.target_modules
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (tied and not head_is_adapted)
    again = HFStudent(str(tmp_path / "out"))
    torch.testing.assert_close(logits_of(again.load()), logits_of(loaded), atol=0, rtol=0)


def test_a_saved_adapter_loads_on_its_base_and_trains_on(tmp_path, tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(r=4))
    model = student.load()
    train_adapter(model)
    student.save(model, tmp_path / "adapter", merge_adapter=False)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(through_transformers), logits_of(model), atol=1e-5, rtol=1e-5)
    AutoTokenizer.from_pretrained(tmp_path / "adapter")
    again = HFStudent(str(tiny_qwen3_folder), adapter_path=str(tmp_path / "adapter"))
    assert again.has_adapter
    loaded = again.load()
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=0, rtol=0)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_default_lora_on_a_mixture_of_experts_trains_and_is_saved(tmp_path, architecture):
    model = make_model(architecture, **MIXTURES[architecture])
    folder = save_folder(tmp_path / "source", model, make_tokenizer())
    student = HFStudent(str(folder), lora=LoraSettings(r=2))
    model = student.load()
    _, batch = make_batch()
    student.head(model)(student.hidden_states(model, batch)).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("experts" in name for name in trained)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    train_adapter(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student.save(model, tmp_path / "whole")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits_of(whole), logits_of(model), atol=1e-3, rtol=1e-3)
    assert (logits_of(whole) - logits_of(HFStudent(str(folder)).load())).abs().max() > 0.1
    student.save(model, tmp_path / "adapter", merge_adapter=False)
    again = HFStudent(str(folder), adapter_path=str(tmp_path / "adapter")).load()
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=1e-5)


def test_saved_dtype_generation_config_and_tokenizer(tmp_path):
    folder = save_folder(
        tmp_path / "source", make_model(tie_word_embeddings=True), make_tokenizer(), eos_token_id=END_OF_TURN
    )
    template = "{{ '<|im_start|>' }}{{ messages[0]['content'] }}"
    student = HFStudent(str(folder), extra_stop_tokens=["<|endoftext|>"], chat_template=template)
    model = student.load()
    student.save(model, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert next(model.parameters()).dtype == torch.float32
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [END_OF_TEXT, END_OF_TURN]
    again = HFStudent(str(tmp_path / "out"))
    messages = [{"role": "user", "content": "abc"}]
    assert again.tokenizer.render(messages) == student.tokenizer.render(messages)
    assert again.tokenizer.stop_ids == student.tokenizer.stop_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_named_weights_are_those_of_a_plain_model(tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(r=4))
    model = student.load()
    train_adapter(model)
    plain = HFStudent(str(tiny_qwen3_folder)).load()
    weights = dict(student.named_weights(model))
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(logits_of(plain), logits_of(model), atol=1e-4, rtol=1e-4)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    expected = layer.base_layer.weight + 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(weights[f"{name}.weight"], expected.detach())


def test_description_is_plain_and_complete():
    settings = {
        "path": "somewhere",
        "lora": LoraSettings(r=8, target_modules=["q_proj"]),
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": True,
        "trust_remote_code": False,
        "revision": "v2",
        "chat_template": "{{ messages }}",
        "template_kwargs": {"enable_thinking": False},
        "extra_stop_tokens": ["<|im_end|>", 3],
        "max_context_length": 99,
        "adapter_path": None,
        "packing": False,
    }
    description = HFStudent(**settings).describe()
    assert description == json.loads(json.dumps(description))
    assert description["class_path"] == "opd_lightning.backends.hf.HFStudent"
    assert description["init_args"] == settings | {
        "lora": {"r": 8, "alpha": 32.0, "dropout": 0.0, "target_modules": ["q_proj"]}
    }


class LayeredStudent(HFStudent):
    """A subclass with an argument of its own, as a user would write it."""

    def __init__(self, path: str, num_layers: int = 1, **kwargs):
        super().__init__(path, **kwargs)
        self.num_layers = num_layers


def test_a_subclass_is_described_with_its_own_arguments():
    description = LayeredStudent("somewhere", num_layers=3, lora=LoraSettings(r=2)).describe()
    assert description["class_path"].endswith("test_hf_student.LayeredStudent")
    expected = HFStudent("somewhere", lora=LoraSettings(r=2)).describe()["init_args"] | {"num_layers": 3}
    assert description["init_args"] == expected
    description["init_args"]["lora"]["r"] = 5  # a copy


def test_an_argument_that_a_subclass_forgets_is_named_before_the_weights_are_read():
    class Forgetful(HFStudent):
        def __init__(self, path: str, num_layers: int = 1):
            super().__init__(path)

    with pytest.raises(ValueError, match=r"Forgetful: its argument 'num_layers' must be kept as self\.num_layers"):
        Forgetful("/there/is/nothing/here").load()


def test_context_length(tiny_qwen3_folder):
    path = str(tiny_qwen3_folder)
    assert HFStudent(path).context_length == 128
    assert HFStudent(path, max_context_length=50).context_length == 50
    with pytest.raises(ValueError, match=r"student\.max_context_length: .* at most 128 tokens, got 129"):
        _ = HFStudent(path, max_context_length=129).context_length


def test_training_all_weights_in_float16_is_refused(tiny_qwen3_folder):
    with pytest.raises(ValueError, match=r"student\.dtype: all weights would be trained in float16.*Use float32"):
        HFStudent(str(tiny_qwen3_folder), dtype="float16").load()
    HFStudent(str(tiny_qwen3_folder), dtype="float16", lora=LoraSettings(r=2)).load()  # a frozen base may be


def test_training_all_weights_in_bfloat16_is_warned_about(tiny_qwen3_folder):
    with pytest.warns(UserWarning, match=r"student\.dtype: all weights are trained in bfloat16.*float32"):
        HFStudent(str(tiny_qwen3_folder), dtype="bfloat16").load()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HFStudent("x", dtype="fp32"), r"student\.dtype: expected 'auto' or one of float32, .* got 'fp32'"),
        (lambda: HFStudent("x", lora=LoraSettings(), adapter_path="y"), r"student\.lora: .* leave out lora or adapter"),
        (
            lambda: HFStudent("x", max_context_length=1),
            r"student\.max_context_length: expected at least 2 tokens, got 1",
        ),
        (lambda: LoraSettings(r=0), r"student\.lora\.r: expected an integer of at least 1, got 0"),
        (lambda: LoraSettings(alpha=0), r"student\.lora\.alpha: expected a positive number, got 0"),
        (lambda: LoraSettings(dropout=1.0), r"student\.lora\.dropout: expected a number in \[0, 1\), got 1\.0"),
    ],
)
def test_impossible_settings_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_target_modules_are_named(tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"student\.lora\.target_modules: \['query'\] .* down_proj, .*q_proj"):
        student.load()


def test_a_missing_adapter_is_named(tiny_qwen3_folder, tmp_path):
    student = HFStudent(str(tiny_qwen3_folder), adapter_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"student\.adapter_path: cannot load a LoRA adapter from"):
        student.load()


def test_saving_settings_are_checked(tiny_qwen3_folder, tmp_path):
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(r=2))
    model = student.load()
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, .* got 'auto'"):
        student.save(model, tmp_path / "a", dtype="auto")
    with pytest.raises(ValueError, match=r"dtype: a bare adapter keeps its own"):
        student.save(model, tmp_path / "b", merge_adapter=False, dtype="bfloat16")
