"""Teachers: scores against a float64 reference, nothing registered, offload, and the student's own base."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from opd_lightning.backends.hf.hidden_scores import HiddenScores
from torch import nn
from transformers import AutoModelForCausalLM

from opd_lightning.backends.hf import BaseModelTeacher, HFStudent, HFTeacher, LoraSettings, hidden_scores
from opd_lightning.backends.hf.teacher import _VisitingWeights
from opd_lightning.interfaces import Problem, Rollout, ScoreRequest
from opd_lightning.rollouts.batching import collate

CPU = torch.device("cpu")
EVERYTHING = ScoreRequest(top_k=16, arbitrary_ids=True, full_vocabulary=True)


def make_batches(num_batches: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    batches, rollouts = [], []
    for _ in range(num_batches):
        group = []
        for num_prompt, num_response in ((3, 5), (6, 2), (1, 9)):
            ids = torch.randint(7, VOCAB_SIZE, (num_prompt + num_response,), generator=generator)
            problem = Problem(uid="u", messages=(), answer="")
            group.append(
                Rollout(problem, ids[:num_prompt], ids[num_prompt:], torch.zeros(num_response), finished=True, seed=0)
            )
        rollouts.append(group)
        batches.append(collate(group, 0))
    return batches, rollouts


def reference(folder, rollouts, temperature: float = 1.0) -> torch.Tensor:
    """[N, V] log-probabilities, row by row without padding, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = []
    for rollout in rollouts:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :VOCAB_SIZE]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.cat(rows)


def ready(teacher, student):
    teacher.setup(student, nn.Identity(), CPU)
    return teacher


@pytest.fixture
def student(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("options", [{}, {"offload": True}, {"float32_head": True}], ids=str)
def test_scores_against_float64(tiny_teacher_folder, student, temperature, options):
    teacher = ready(HFTeacher(str(tiny_teacher_folder), **options), student)
    (batch,), (rollouts,) = make_batches()
    result = teacher.score(batch, ScoreRequest(16, True, True, temperature=temperature))
    expected = reference(tiny_teacher_folder, rollouts, temperature)
    assert result.num_tokens == batch.num_tokens
    full = result.full()
    assert full.dtype == torch.float32
    torch.testing.assert_close(full.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.exp().sum(-1), torch.ones(len(full)))
    torch.testing.assert_close(result.sampled(), full.gather(1, batch.response_ids[:, None])[:, 0])
    ids = torch.randint(0, VOCAB_SIZE, (batch.num_tokens, 4), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.at(ids), full.gather(1, ids))
    top_ids, top_log_probs = result.topk(7)
    torch.testing.assert_close(top_log_probs.double(), expected.topk(7).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.gather(1, top_ids), top_log_probs)
    assert result.topk(10_000)[0].shape == (batch.num_tokens, VOCAB_SIZE)
    assert not any(tensor.requires_grad for tensor in (full, result.at(ids), top_log_probs))


@pytest.mark.parametrize("entries", [1, 3 * VOCAB_SIZE, 2**27])
def test_slices_and_parts_give_the_same(monkeypatch, entries):
    monkeypatch.setattr(hidden_scores, "_ENTRIES_AT_ONCE", entries)
    generator = torch.Generator().manual_seed(0)
    hidden, ids = torch.randn(11, 5, generator=generator), torch.randint(0, VOCAB_SIZE, (11,), generator=generator)
    head = torch.randn(VOCAB_SIZE, 5, generator=generator)
    largest = []

    def logits(states):
        largest.append(len(states) * VOCAB_SIZE)
        return states @ head.T

    result = HiddenScores(hidden, ids, logits, VOCAB_SIZE, temperature=2.0)
    expected = (hidden @ head.T / 2).log_softmax(-1)
    torch.testing.assert_close(result.sampled(), expected.gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(result.topk(3)[1], expected.topk(3).values)
    assert max(largest) <= max(entries, VOCAB_SIZE)
    part = result.slice(4, 9)
    assert part.num_tokens == 5
    torch.testing.assert_close(part.full(), expected[4:9])
    torch.testing.assert_close(part.slice(1, 3).sampled(), expected[5:7].gather(1, ids[5:7, None])[:, 0])


def test_a_slice_runs_the_head_once(tiny_teacher_folder, student):
    teacher = ready(HFTeacher(str(tiny_teacher_folder)), student)
    (batch,), _ = make_batches()
    calls = []
    teacher._head.register_forward_hook(lambda *_: calls.append(1))
    part = teacher.score(batch, EVERYTHING).slice(2, 9)
    assert calls == []
    part.sampled(), part.topk(4), part.at(torch.zeros(7, 2, dtype=torch.int64)), part.full()
    assert calls == [1]


@pytest.mark.parametrize("offload", [False, True])
def test_score_all_keeps_the_order_and_equals_score(tiny_teacher_folder, student, offload):
    teacher = ready(HFTeacher(str(tiny_teacher_folder), offload=offload), student)
    batches, _ = make_batches(3)
    together = list(teacher.score_all(batches, EVERYTHING))
    for batch, result in zip(batches, together, strict=True):
        torch.testing.assert_close(result.full(), teacher.score(batch, EVERYTHING).full())


def test_teacher_runs_in_its_own_precision_whatever_surrounds_it(tiny_teacher_folder, student):
    (batch,), _ = make_batches()
    teacher = ready(HFTeacher(str(tiny_teacher_folder), dtype="float32"), student)
    expected = teacher.score(batch, EVERYTHING).full()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.score(batch, EVERYTHING).full(), expected)
    low = ready(HFTeacher(str(tiny_teacher_folder), dtype="bfloat16"), student)
    assert {parameter.dtype for parameter in low._model.parameters()} == {torch.bfloat16}
    assert low.score(batch, EVERYTHING).full().dtype == torch.float32
    torch.testing.assert_close(low.score(batch, EVERYTHING).full(), expected, atol=0.3, rtol=0.1)


def test_a_float32_head_does_not_round_logits(tmp_path, student):
    model = make_model(seed=2, spread=20.0)
    folder = save_folder(tmp_path, model.bfloat16(), make_tokenizer())
    (batch,), _ = make_batches()
    coarse = ready(HFTeacher(str(folder)), student)
    fine = ready(HFTeacher(str(folder), float32_head=True), student)
    hidden = coarse.score(batch, EVERYTHING)._hidden
    expected = hidden.double() @ coarse._model.lm_head.weight.double()[:VOCAB_SIZE].T
    errors = [(teacher._logits(hidden).double() - expected).abs().max() for teacher in (coarse, fine)]
    assert errors[0] > 0.1
    assert errors[1] < 1e-3
    assert coarse._model.lm_head.weight.dtype == fine._model.lm_head.weight.dtype == torch.bfloat16


def test_teacher_is_frozen_and_no_part_of_a_module(tiny_teacher_folder, student):
    teacher = ready(HFTeacher(str(tiny_teacher_folder)), student)
    holder = nn.Module()
    holder.teacher = teacher
    assert holder.state_dict() == {}
    assert list(holder.parameters()) == []
    assert not any(parameter.requires_grad for parameter in teacher._model.parameters())
    assert not teacher._model.training
    loaded = teacher._model
    teacher.setup(student, nn.Identity(), CPU)
    assert teacher._model is loaded
    teacher.close()
    assert teacher._model is None


@pytest.mark.parametrize("tied", [False, True])
def test_weights_visit_the_device_and_come_back(tied):
    model = make_model(tie_word_embeddings=tied).requires_grad_(False)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    visitor = _VisitingWeights(model.get_decoder(), torch.device("meta"))

    def fail():
        with visitor.on_device():
            body = model.get_decoder()
            assert {tensor.device.type for tensor in (*body.parameters(), *body.buffers())} == {"meta"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for name, tensor in model.state_dict().items():
        assert (tensor.data_ptr(), tensor.device.type) == (before[name][0], "cpu")
        assert torch.equal(tensor, before[name][1])


def test_with_offload_the_body_rests_on_the_cpu_and_the_head_does_not(tmp_path, student):
    folder = save_folder(tmp_path, make_model(seed=2, tie_word_embeddings=True), make_tokenizer())
    teacher = ready(HFTeacher(str(folder), offload=True), student)
    assert teacher._head.weight is not teacher._model.get_decoder().embed_tokens.weight
    (batch,), (rollouts,) = make_batches()
    torch.testing.assert_close(
        teacher.score(batch, EVERYTHING).full().double(), reference(folder, rollouts), atol=1e-5, rtol=1e-5
    )


def test_a_rollout_beyond_the_teachers_context_is_refused(tmp_path, student):
    folder = save_folder(tmp_path, make_model(seed=2, max_position_embeddings=8), make_tokenizer())
    teacher = HFTeacher(str(folder))
    with pytest.warns(UserWarning, match=r"context of 8 tokens is shorter .* Set student\.max_context_length: 8"):
        ready(teacher, student)
    assert teacher.context_length == 8
    with pytest.raises(ValueError, match=r"rollout of 10 tokens is longer than the context of .* 8 tokens"):
        teacher.score(make_batches()[0][0], EVERYTHING)


@pytest.mark.parametrize("own_base", [False, True], ids=["HFTeacher", "BaseModelTeacher"])
def test_whatever_may_be_asked_is_given(tiny_qwen3_folder, tiny_teacher_folder, student, own_base):
    if own_base:
        spec, model = lora_student(tiny_qwen3_folder)
        teacher = BaseModelTeacher()
        teacher.setup(spec, model, CPU)
    else:
        teacher = ready(HFTeacher(str(tiny_teacher_folder)), student)
    everything = ScoreRequest(top_k=VOCAB_SIZE, arbitrary_ids=True, full_vocabulary=True)
    teacher.check(everything)
    (batch,), _ = make_batches()
    scores = teacher.score(batch, everything)
    full = scores.full()
    expected = full.sort(dim=-1, descending=True)
    ids, values = scores.topk(VOCAB_SIZE)
    torch.testing.assert_close(values, expected.values)
    torch.testing.assert_close(full.gather(-1, ids), values)
    torch.testing.assert_close(scores.at(ids[:, ::2]), values[:, ::2])
    torch.testing.assert_close(scores.sampled(), full.gather(-1, batch.tokens.ids[:, None]).squeeze(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "half"}, r"teacher\.dtype: expected 'auto' or one of .* got 'half'"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            r"teacher\.quantization_config: expected a key 'quant_method'",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}, "offload": True}, r"teacher\.offload: quantised"),
    ],
)
def test_impossible_settings_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        HFTeacher("x", **options)


# ------------------------------------------------------------------------------------------ the student's own base


def lora_student(folder, **options):
    student = HFStudent(str(folder), lora=LoraSettings(r=4, dropout=0.5, **options))
    model = student.load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return student, model


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "lm_head"]], ids=["body", "head"])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_base_model_teacher_is_the_base(tiny_qwen3_folder, target_modules, precision):
    student, model = lora_student(tiny_qwen3_folder, target_modules=target_modules)
    model.get_base_model().model.norm.eval()
    teacher = BaseModelTeacher()
    teacher.setup(student, model, CPU)
    (batch,), (rollouts,) = make_batches()
    modes = [module.training for module in model.modules()]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16) if precision == "autocast" else nullcontext():
        result = teacher.score(batch, EVERYTHING)
        assert torch.equal(torch.get_rng_state(), state)  # dropout was off
        # scores are used lazily, between the student's forward and backward
        logits = student.logits(model, student.hidden_states(model, batch))
        full = result.full()
        logits.square().mean().backward()
    tolerance = 1e-5 if precision == "float32" else 0.3
    torch.testing.assert_close(full.double(), reference(tiny_qwen3_folder, rollouts), atol=tolerance, rtol=tolerance)
    assert [module.training for module in model.modules()] == modes
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert (logits.log_softmax(-1) - full).abs().max() > 0.1  # the adapter was off, and is on again


def test_a_fresh_adapter_agrees_with_its_base_exactly_even_under_autocast(tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder), lora=LoraSettings(r=4))
    model = student.load()
    teacher = BaseModelTeacher()
    teacher.setup(student, model, CPU)
    (batch,), _ = make_batches()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student.logits(model, student.hidden_states(model, batch))
        assert torch.equal(logits.log_softmax(-1), teacher.score(batch, EVERYTHING).full())


def test_base_model_teacher_needs_an_adapter(student):
    with pytest.raises(ValueError, match=r"BaseModelTeacher is the student without its adapter.*Set student\.lora"):
        BaseModelTeacher().preflight(student)
