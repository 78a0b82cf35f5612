"""The student's moving average as its teacher: its steps, its checkpoints, and that the student does not notice."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from scoring import CPU, EVERYTHING, check_everything, make_batches

from opd_lightning.backends.hf import HFStudent, LoraSettings
from opd_lightning.teachers import MovingAverageTeacher


@pytest.fixture
def student(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder))


def ready(student, model, rate, state=None):
    teacher = MovingAverageTeacher(rate)
    teacher.preflight(student)
    if state is not None:
        teacher.load_state_dict(state)
    teacher.setup(student, model, CPU)
    return teacher


def step(model, seed):
    """Move the trained weights as an optimiser would: in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))


def says(student, model):
    """What a model says, run as the student."""
    (batch,), _ = make_batches()
    with torch.no_grad():
        return student.head(model)(student.hidden_states(model, batch)).log_softmax(-1)


def scores(teacher):
    (batch,), _ = make_batches()
    return teacher.score(batch, EVERYTHING).full()


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["whole", "lora"])
def test_it_is_the_average_of_the_students_so_far_and_at_its_ends_the_first_and_the_last(tiny_qwen3_folder, lora):
    student = HFStudent(str(tiny_qwen3_folder), lora=lora)
    model = student.load()
    step(model, 0)
    first, average = copy.deepcopy(model), copy.deepcopy(model)
    teachers = {rate: ready(student, model, rate) for rate in (0, 0.25, 1)}
    for seed in (1, 2):
        step(model, seed)
        with torch.no_grad():
            for mine, other in zip(average.parameters(), model.parameters(), strict=True):
                mine.copy_(0.75 * mine + 0.25 * other)
        for teacher in teachers.values():
            teacher.follow()
    assert torch.equal(scores(teachers[0]), says(student, first))
    assert torch.equal(scores(teachers[1]), says(student, model))
    torch.testing.assert_close(scores(teachers[0.25]), says(student, average), atol=1e-4, rtol=1e-4)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert list(teachers[0.25].state_dict()["average"]) == trained and not teachers[1].state_dict()
    assert [teachers[rate].changes for rate in teachers] == [False, True, True]


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_the_student_does_not_notice(student, precision):
    model = student.load()
    teacher = ready(student, model, 0.5)
    initial = copy.deepcopy(model)
    step(model, 1)
    places = [weight.data_ptr() for weight in model.parameters()]
    (batch,), _ = make_batches()

    def precisely():
        return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "autocast" else nullcontext()

    def losses():
        return student.head(model)(student.hidden_states(model, batch)).square().mean()

    with precisely():
        expected = says(student, initial)
    with precisely():  # one context for all, as in a training step: autocast keeps casts of weights
        losses().backward()
        gradients = [weight.grad.clone() for weight in model.parameters()]
        result = teacher.score(batch, EVERYTHING)
        model.zero_grad()
        losses().backward()  # scores are read after the student's pass
        assert torch.equal(result.full(), expected)
    assert not result.full().requires_grad and all(module.training for module in model.modules())
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert all(torch.equal(weight.grad, other) for weight, other in zip(model.parameters(), gradients, strict=True))


def test_a_resumed_average_is_the_same_to_the_last_bit(student):
    model = student.load()
    teacher = ready(student, model, 0.3)
    step(model, 1)
    teacher.follow()
    teacher.close()  # a checkpoint may be written after that
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = ready(student, model, 0.3, state)
    teacher.load_state_dict(state)
    teacher.setup(student, model, CPU)
    for each in (teacher, again):
        each.follow()
    assert torch.equal(scores(again), scores(teacher))
    assert not torch.equal(scores(ready(student, model, 0.3)), scores(teacher))


def test_what_does_not_fit_is_refused(student):
    with pytest.raises(ValueError, match=r"model\.teacher\.rate: expected a number from 0 .* got 1\.5"):
        MovingAverageTeacher(1.5)
    with pytest.raises(ValueError, match=r"goes on with the average in the checkpoint, which holds none"):
        MovingAverageTeacher().load_state_dict({})
    with pytest.raises(ValueError, match=r"of other weights than the student trains now"):
        ready(student, student.load(), 0.5, {"average": {"weight": torch.zeros(2)}})
    with pytest.raises(ValueError, match=r"paged: MovingAverageTeacher cannot leave the device"):
        MovingAverageTeacher().page()


def test_whatever_may_be_asked_is_given(student):
    check_everything(ready(student, student.load(), 0.1))
