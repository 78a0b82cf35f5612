"""A rehearsed step, against the tensors of a real one."""

from dataclasses import replace

import pytest
import torch
from conftest import VOCAB_SIZE

from opd_lightning.backends.hf import HFStudent, HFTeacher, LoraSettings
from opd_lightning.interfaces import Sampling
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.planning import HARDWARE, Case, NotPlannedError, TeacherElsewhere, rehearse
from opd_lightning.planning.case import SharedTeacher
from opd_lightning.planning.rehearsal import _gathered
from opd_lightning.training.metrics import add_metrics

SMALL = LoraSettings(r=2)


def bytes_of(tensors):
    return sum(each.nbytes for each in tensors)


def held(found, phase):
    (one,) = (each for each in found.phases if each.name == phase)
    return one.peak


@pytest.fixture
def make_case(tiny_qwen3_folder, tiny_teacher_folder):
    def make(**changes):
        objective = DivergenceObjective()
        teacher = HFTeacher(str(tiny_teacher_folder), dtype="bfloat16")
        case = Case(
            student=HFStudent(str(tiny_qwen3_folder), **changes.pop("student", {})),
            make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
            objective=objective,
            teacher=teacher,
            request=add_metrics(objective.request(), teacher.offer, 16),
            prompt_tokens=6,
            response_tokens=10,
            num_rollouts=4,
            sampling=Sampling(max_new_tokens=10),
        )
        return replace(case, **changes)

    return make


@pytest.mark.slow
def test_weights_gradients_and_moments_are_those_of_a_real_step(make_case, tiny_qwen3_folder, tiny_teacher_folder):
    found = rehearse(make_case(), HARDWARE["H100"])
    student = HFStudent(str(tiny_qwen3_folder)).load()
    weights = bytes_of([*student.parameters(), *student.buffers()])
    optimizer = torch.optim.AdamW(student.parameters())
    for each in student.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()
    moments = bytes_of(value for state in optimizer.state.values() for value in state.values())
    teacher = HFTeacher(str(tiny_teacher_folder), dtype="bfloat16")
    teacher.setup(HFStudent(str(tiny_qwen3_folder)), student, torch.device("cpu"))
    peak = held(found, "optimizer")
    assert peak["student weights"] == weights and peak["gradients"] == found.trained_bytes
    assert found.trained_bytes == bytes_of(student.parameters())
    assert peak["optimiser state"] == moments
    assert peak["teacher weights"] == bytes_of([*teacher._model.parameters(), *teacher._model.buffers()])
    assert [phase.name for phase in found.phases] == ["generate", "teacher", "student", "optimizer"]
    assert all(phase.seconds > 0 and phase.num_calls > 0 for phase in found.phases)
    layers = student.get_decoder().layers
    assert _gathered(student) == bytes_of(student.parameters()) - bytes_of(layers[0].parameters())  # of two


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_is_what_a_real_one_keeps(make_case, tiny_qwen3_folder):
    case = make_case(teacher=None, request=None, facts_k=0, engine_rows=0)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dtype.is_floating_point:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = case.student.load()
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    ids = torch.zeros(4, 16, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.get_decoder()(ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    activations = sum(size for place, size in kept.items() if place not in weights)
    assert states.shape == (4, 16, 32)
    with_teacher = rehearse(make_case(engine_rows=0))
    assert held(with_teacher, "student")["activations"] == pytest.approx(activations, rel=0.25)


@pytest.mark.slow
def test_settings_that_save_memory_save_it(make_case):
    plain = rehearse(make_case(num_copies=2))
    assert held(plain, "optimizer")["EffOPD's copies"] == 2 * plain.trained_bytes
    lora = rehearse(make_case(student={"lora": SMALL}))
    assert lora.trained_bytes < 0.2 * plain.trained_bytes
    assert held(lora, "optimizer")["gradients"] == lora.trained_bytes
    cut = rehearse(make_case(max_tokens=16))
    assert held(cut, "student")["activations"] < 0.4 * held(plain, "student")["activations"]
    recomputed = rehearse(make_case(student={"gradient_checkpointing": True}))
    assert held(recomputed, "student")["activations"] < held(plain, "student")["activations"]
    fewer = rehearse(make_case(engine_rows=1))
    assert held(fewer, "generate")["keys and values"] < 0.3 * held(plain, "generate")["keys and values"]
    half = rehearse(make_case(in_bfloat16=True))
    assert held(half, "generate")["keys and values"] == held(plain, "generate")["keys and values"] / 2
    sgd = rehearse(make_case(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3)))
    assert "optimiser state" not in held(sgd, "optimizer")


@pytest.mark.slow
def test_a_teacher_elsewhere_holds_nothing(make_case):
    case = make_case()
    found = rehearse(replace(case, teacher=TeacherElsewhere(case.teacher.offer, VOCAB_SIZE)))
    assert "teacher weights" not in held(found, "student")


@pytest.mark.slow
def test_teachers_that_are_not_whole(make_case, tiny_qwen3_folder, tiny_teacher_folder):
    offloaded = rehearse(make_case(teacher=HFTeacher(str(tiny_teacher_folder), dtype="bfloat16", offload=True)))
    assert offloaded.resting_bytes == 2 * 48 * (offloaded.resting_bytes // 96) > 0  # the head alone
    assert offloaded.shared_teacher is None
    several = rehearse(make_case(max_tokens=16))  # one of its four rollouts at a time
    teacher = HFTeacher(str(tiny_teacher_folder), dtype="bfloat16")
    teacher.setup(HFStudent(str(tiny_qwen3_folder)), torch.nn.Module(), torch.device("cpu"))
    body, head = teacher._model.get_decoder(), teacher._model.lm_head
    assert several.shared_teacher == SharedTeacher(
        body_bytes=bytes_of(body.parameters()),
        gathered_bytes=bytes_of(body.parameters()) - bytes_of(body.layers[0].parameters()),  # of two
        head_bytes=bytes_of(head.parameters()),
    )
    assert several.scores_bytes == 3 * 10 * 48 * 2  # tokens, hidden size, bfloat16
    lora = rehearse(make_case(student={"lora": SMALL}))
    assert 0 < lora.gathered_gradient_bytes < lora.trained_bytes < several.gathered_gradient_bytes
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    quantised = rehearse(
        make_case(teacher=HFTeacher(str(tiny_teacher_folder), "bfloat16", quantization_config=settings))
    )
    assert 0 < quantised.saved_bytes < held(quantised, "optimizer")["teacher weights"] / 2


@pytest.mark.slow
def test_a_long_chunk_of_the_loss_is_the_line_through_two_short_ones(make_case, monkeypatch):
    case = make_case(response_tokens=40, prompt_tokens=4)
    whole = held(rehearse(case), "student")
    monkeypatch.setattr("opd_lightning.planning.rehearsal._ENTRIES", 16 * 81)
    line = held(rehearse(case), "student")
    assert {part: pytest.approx(size, rel=0.05, abs=4096) for part, size in whole.items()} == line


@pytest.mark.slow
def test_what_depends_on_data_is_refused_in_one_line(make_case):
    class Decides(DivergenceObjective):
        def token_losses(self, student_logits, teacher, tokens):
            return student_logits[:, 0] if bool(student_logits.sum() > 0) else student_logits[:, 1]

    with pytest.raises(NotPlannedError, match=r"^plan: this step cannot be rehearsed .*measure_memory: true"):
        rehearse(make_case(objective=Decides()))
