"""Gradients of single answers, against plain autograd in float64."""

import pytest
import torch
from conftest import VOCAB_SIZE
from rollouts_by_hand import make_rollout
from transformers import AutoModelForCausalLM

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.diagnosis.gradients import FULL, OWN, SAMPLED, _drawn_places, losses_to_compare, measure_gradients
from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import DivergenceObjective, StudentTopK

CPU = torch.device("cpu")
EVERYTHING = ScoreRequest(top_k=64, arbitrary_ids=True, full_vocabulary=True)
ROLLOUTS = [make_rollout([9, 10, 11]), make_rollout([12, 13]), make_rollout([14, 15, 16, 17, 18])]


@pytest.fixture(scope="module")
def pair(tiny_qwen3_folder, tiny_teacher_folder):
    student = HFStudent(str(tiny_qwen3_folder), dtype="float64")
    teacher = HFTeacher(str(tiny_teacher_folder), dtype="float64")
    model = student.load().eval()
    teacher.preflight(student)
    teacher.setup(student, model, CPU)
    return student, model, teacher


def measure(pair, objective, **options):
    student, model, teacher = pair
    losses = losses_to_compare(objective, teacher.offer, VOCAB_SIZE)
    return measure_gradients(
        student, model, ROLLOUTS, losses, teacher, EVERYTHING, device=CPU, max_tokens=99, **options
    )


def reference(student_folder, teacher_folder, k):
    """[3, M] gradients of the reverse KL on the student's top k, renormalised, summed over each answer's tokens."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (student_folder, teacher_folder)
    )
    rows = []
    for rollout in ROLLOUTS:
        ids, start = torch.cat([rollout.prompt_ids, rollout.response_ids])[None], len(rollout.prompt_ids) - 1
        own = student(input_ids=ids).logits[0, start:-1, :VOCAB_SIZE]
        with torch.no_grad():
            other = teacher(input_ids=ids).logits[0, start:-1, :VOCAB_SIZE]
        top = own.topk(k, dim=-1).indices
        p, q = (logits.gather(-1, top).log_softmax(-1) for logits in (own, other))
        gradients = torch.autograd.grad((p.exp() * (p - q)).sum(), list(student.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def test_every_number_is_that_of_plain_autograd(pair, tiny_qwen3_folder, tiny_teacher_folder):
    full = reference(tiny_qwen3_folder, tiny_teacher_folder, VOCAB_SIZE)
    top = reference(tiny_qwen3_folder, tiny_teacher_folder, 4)
    found = measure(pair, DivergenceObjective(StudentTopK(4)))
    by_name = {each.loss: each for each in found.losses}
    assert found.num_rollouts == 3 and found.num_kept == found.num_weights == full.shape[1]
    assert by_name[OWN].k is None and by_name["student top 4"].k == 4
    for each in (by_name[OWN], by_name["student top 4"]):
        norms, total = top.norm(dim=1), top.sum(0)
        assert each.norm == pytest.approx(float(total.norm()) / 10, rel=1e-4)  # 10 tokens
        assert each.coherence == pytest.approx(float(total.norm() / norms.sum()), rel=1e-4)
        cross = [float(top[i] @ top[j]) for i in range(3) for j in range(3) if i != j]
        assert each.signal == pytest.approx(sum(cross) / 6 / float(norms.square().mean()), rel=1e-4)
        assert each.cosine == pytest.approx(float(torch.cosine_similarity(total, full.sum(0), dim=0)), rel=1e-4)
        spread = [float((rows - rows.mean(0)).square().sum()) for rows in (top, full)]
        assert each.variance == pytest.approx(spread[0] / spread[1], rel=1e-4)
        assert each.error == pytest.approx(float((top - full).square().sum() / full.square().sum()), rel=1e-4)
    exact = by_name[FULL]
    assert (exact.cosine, exact.variance, exact.error) == pytest.approx((1, 1, 0), abs=1e-9)
    assert by_name[SAMPLED].error > by_name["student top 16"].error > by_name["student top 64 + tail"].error


def test_fewer_weights_give_about_the_same_numbers(pair):
    whole = measure(pair, DivergenceObjective())
    part = measure(pair, DivergenceObjective(), most_kept=5000)
    assert part.num_kept == 5000 < part.num_weights == whole.num_weights
    for a, b in zip(whole.losses, part.losses, strict=True):
        assert b.cosine == pytest.approx(a.cosine, abs=0.1) and b.coherence == pytest.approx(a.coherence, abs=0.1)
    assert part == measure(pair, DivergenceObjective(), most_kept=5000)


def test_the_same_model_twice_has_no_gradient(pair, tiny_qwen3_folder):
    student, model, _ = pair
    twin = HFTeacher(str(tiny_qwen3_folder), dtype="float64")
    twin.preflight(student)
    twin.setup(student, model, CPU)
    exact = next(each for each in measure((student, model, twin), DivergenceObjective()).losses if each.loss == FULL)
    assert exact.norm == pytest.approx(0, abs=1e-5)


def test_only_what_the_teacher_can_answer_is_compared():
    sampled = losses_to_compare(DivergenceObjective(), ScoreRequest(), 1000)
    assert list(sampled) == [OWN, SAMPLED, "sampled token + tail"]
    listed = losses_to_compare(DivergenceObjective(), ScoreRequest(top_k=20), 1000)
    assert list(listed)[3:] == ["teacher top 4 + tail", "teacher top 16 + tail"]
    small = losses_to_compare(DivergenceObjective(), EVERYTHING, 16)
    assert [k for _, k in small.values() if k] == [1, 4, 4, 4]


def test_weights_are_drawn_from_all_tensors_alike():
    places = _drawn_places([1000, 10, 3000], 400, seed=0)
    assert sum(len(each) for each in places) == 400
    assert all(
        each.min() >= 0 and each.max() < size for each, size in zip(places, [1000, 10, 3000], strict=True) if len(each)
    )
    assert len(places[0]) == pytest.approx(100, abs=30)
    assert [each.tolist() for each in _drawn_places([2, 1], 3, seed=0)] == [[0, 1], [0]]
