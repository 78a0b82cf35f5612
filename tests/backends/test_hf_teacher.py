"""The teacher: scores against a float64 reference, nothing registered, offload, and subclasses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from scoring import CPU, EVERYTHING, check_everything, make_batches, reference
from torch import nn

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.backends.hf.teacher import _VisitingWeights
from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.rollouts.comparison import compare

EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


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
    torch.testing.assert_close(result.sampled(), full.gather(1, batch.tokens.ids[:, None])[:, 0])
    ids = torch.randint(0, VOCAB_SIZE, (batch.num_tokens, 4), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result.at(ids), full.gather(1, ids))
    top_ids, top_log_probs = result.topk(7)
    torch.testing.assert_close(top_log_probs.double(), expected.topk(7).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.gather(1, top_ids), top_log_probs)
    assert result.topk(10_000)[0].shape == (batch.num_tokens, VOCAB_SIZE)
    assert not any(tensor.requires_grad for tensor in (full, result.at(ids), top_log_probs))


@pytest.mark.parametrize("offload", [False, True])
def test_score_all_keeps_the_order_and_equals_score(tiny_teacher_folder, student, offload):
    teacher = ready(HFTeacher(str(tiny_teacher_folder), offload=offload), student)
    batches, _ = make_batches(3)
    together = list(teacher.score_all(batches, EVERYTHING))
    for batch, result in zip(batches, together, strict=True):
        torch.testing.assert_close(result.full(), teacher.score(batch, EVERYTHING).full())


def test_a_body_that_is_cut_up_cannot_visit_the_device(tiny_teacher_folder, student):
    with pytest.raises(ValueError, match=r"teacher\.sharded: weights that are quantised, or visit .* Leave one of the"):
        HFTeacher(str(tiny_teacher_folder), offload=True, sharded=True)
    with pytest.raises(ValueError, match=r"teacher\.sharded: .*\(offload, paged\)"):
        HFTeacher(str(tiny_teacher_folder), sharded=True).page()
    alone = ready(HFTeacher(str(tiny_teacher_folder), sharded=True), student)  # diagnose has one process
    assert alone.as_student() is not None


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
    scores = [teacher.score(batch, EVERYTHING) for teacher in (coarse, fine)]
    hidden, _ = scores[0].hidden()
    assert torch.equal(hidden, scores[1].hidden()[0])
    expected = (hidden.double() @ coarse._model.lm_head.weight.double()[:VOCAB_SIZE].T).log_softmax(-1)
    errors = [(result.full().double() - expected).abs().max() for result in scores]
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


def test_offload_says_once_what_it_frees(tmp_path, student, capsys):
    model = make_model(seed=2, tie_word_embeddings=True)
    folder = save_folder(tmp_path, model, make_tokenizer())
    body = sum(each.nbytes for each in (*model.model.parameters(), *model.model.buffers()))
    teacher = HFTeacher(str(folder), offload=True, packing=False)
    for _ in range(2):
        teacher.setup(student, nn.Identity(), torch.device("meta"))
    said = [line for line in capsys.readouterr().err.splitlines() if "teacher.offload" in line]
    assert said == [
        f"teacher.offload: {body:,} bytes of {folder} rest in CPU memory and are on meta while a step is scored; its"
        f" head, {VOCAB_SIZE * model.config.hidden_size * 4:,} bytes, stays there."
    ]
    ready(HFTeacher(str(folder), offload=True), student)
    assert "the device is the CPU, so nothing is freed" in capsys.readouterr().err


class SharperTeacher(HFTeacher):
    """A teacher as a user may write it."""

    def score(self, batch, request):
        self.scored = [*getattr(self, "scored", []), batch]
        return super().score(batch, replace(request, temperature=request.temperature / 2))


@pytest.mark.parametrize("offload", [False, True])
def test_an_overridden_score_has_effect_in_training(tiny_teacher_folder, student, offload):
    teacher = ready(SharperTeacher(str(tiny_teacher_folder), offload=offload), student)
    plain = ready(HFTeacher(str(tiny_teacher_folder)), student)
    batches, _ = make_batches(3)
    objective, model = DivergenceObjective(), student.load()
    model.requires_grad_(False)
    losses = [
        torch.cat([found.losses for found in compare(student, model, batches, objective, scorer, request)])
        for scorer, request in (
            (teacher, objective.request()),
            (plain, replace(objective.request(), temperature=0.5)),
        )
    ]
    assert teacher.scored == batches
    torch.testing.assert_close(*losses)
    unchanged = torch.cat([f.losses for f in compare(student, model, batches, objective, plain, objective.request())])
    assert (losses[0] - unchanged).abs().max() > 0.1


def test_with_offload_the_body_visits_the_device_once_per_step(tiny_teacher_folder, student, monkeypatch):
    teacher = ready(HFTeacher(str(tiny_teacher_folder), offload=True), student)
    batches, _ = make_batches(3)
    visits, go = [], _VisitingWeights.on_device

    def counted(self):
        visits.append(self)
        return go(self)

    monkeypatch.setattr(_VisitingWeights, "on_device", counted)
    scores = list(teacher.score_all(batches, EVERYTHING))
    assert len(visits) == 1
    alone = teacher.score(batches[1], EVERYTHING)
    assert len(visits) == 2
    torch.testing.assert_close(alone.full(), scores[1].full())


def test_a_rollout_beyond_the_teachers_context_is_refused(tmp_path, student):
    folder = save_folder(tmp_path, make_model(seed=2, max_position_embeddings=8), make_tokenizer())
    teacher = HFTeacher(str(folder))
    with pytest.warns(UserWarning, match=r"context of 8 tokens is shorter .* Set student\.max_context_length: 8"):
        ready(teacher, student)
    assert teacher.context_length == 8
    with pytest.raises(ValueError, match=r"rollout of 10 tokens is longer than the context of .* 8 tokens"):
        teacher.score(make_batches()[0][0], EVERYTHING)


def test_whatever_may_be_asked_is_given(tiny_teacher_folder, student):
    check_everything(ready(HFTeacher(str(tiny_teacher_folder)), student))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "half"}, r"teacher\.dtype: expected 'auto' or one of .* got 'half'"),
        (
            {"quantization_config": {"load_in_4bit": True}},
            r"teacher\.quantization_config: expected a key 'quant_method'",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbyte", "load_in_4bit": True}},
            r"quantization_config: quant_method is 'bitsandbyte'; transformers knows .*bitsandbytes, ",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bits": True}},
            r"quantization_config: bitsandbytes needs load_in_4bit: true or load_in_8bit: true beside",
        ),
        (
            {"quantization_config": {**EIGHT_BITS, "threshold": 6.0}},
            r"quantization_config: bitsandbytes has no setting 'threshold'; it has load_in_8bit, .*llm_int8_threshold",
        ),
        ({"quantization_config": EIGHT_BITS, "offload": True}, r"teacher\.offload: quantised"),
    ],
)
def test_impossible_settings_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        HFTeacher("x", **options)


def test_it_answers_with_the_weights_that_score(tiny_teacher_folder, tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder), template_kwargs={"enable_thinking": False})
    teacher = ready(HFTeacher(str(tiny_teacher_folder)), student)
    speaker, model = teacher.as_student()
    (batch,), (rollouts,) = make_batches()
    log_probs = speaker.head(model)(speaker.hidden_states(model, batch)).log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), reference(tiny_teacher_folder, rollouts), atol=1e-5, rtol=1e-5)
    question = [{"role": "user", "content": "1+1"}]
    assert speaker.tokenizer.render(question) == student.tokenizer.render(question)  # asked in the same way
    away = ready(HFTeacher(str(tiny_teacher_folder), offload=True), student)
    assert away.as_student() is None
    teacher.close()
    assert teacher.as_student() is None
