"""The student's own base as its teacher."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from scoring import CPU, EVERYTHING, check_everything, make_batches, reference

from opd_lightning.backends.hf import HFStudent, LoraSettings
from opd_lightning.teachers import BaseModelTeacher


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
        logits = student.head(model)(student.hidden_states(model, batch))
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
        logits = student.head(model)(student.hidden_states(model, batch))
        assert torch.equal(logits.log_softmax(-1), teacher.score(batch, EVERYTHING).full())


def test_base_model_teacher_needs_an_adapter(tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder))
    with pytest.raises(ValueError, match=r"BaseModelTeacher is the student without its adapter.*Set student\.lora"):
        BaseModelTeacher().preflight(student)


def test_whatever_may_be_asked_is_given(tiny_qwen3_folder):
    student, model = lora_student(tiny_qwen3_folder)
    teacher = BaseModelTeacher()
    teacher.setup(student, model, CPU)
    check_everything(teacher)
