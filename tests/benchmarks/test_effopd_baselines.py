"""The identities that make AlphaOPD and ExOPD what they claim to be."""

import effopd_baselines as baselines
import pytest
import torch
from toys import make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.interfaces import ResponseTokens, Score
from opd_lightning.objectives import DenseScores, DivergenceObjective


def random_scores(seed, num_tokens=4, vocabulary=7):
    logits = torch.randn(num_tokens, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return DenseScores(logits.log_softmax(-1), torch.zeros(num_tokens, dtype=torch.long))


def test_the_leading_direction_of_a_rank_one_change_is_all_of_it():
    change = torch.outer(torch.randn(5), torch.randn(3))
    vector, row = baselines.leading_direction(change)
    torch.testing.assert_close(torch.outer(vector, row).float(), change)


@pytest.mark.parametrize("sizes", [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 5.5]])
def test_collinear_checkpoints_are_extrapolated_exactly(sizes):
    direction = torch.outer(torch.randn(6), torch.randn(4))
    changes = [size * direction for size in sizes]
    scores = [0.3 + 0.1 * size for size in sizes]
    for rescale in (False, True):
        predicted = baselines.predict_change(changes, scores, 0.3 + 0.1 * 9, rescale=rescale)
        torch.testing.assert_close(predicted, 9 * direction, rtol=1e-4, atol=1e-4)


def test_the_score_of_a_checkpoint_predicts_that_checkpoint():
    vectors = torch.randn(2, 5, dtype=torch.float64)
    scores = torch.tensor([0.2, 0.5], dtype=torch.float64)
    for vector, score in zip(vectors, scores, strict=True):
        torch.testing.assert_close(baselines.predict_vector(vectors, scores, float(score)), vector)


def test_a_sign_flip_between_decompositions_does_not_matter(monkeypatch):
    changes = [size * torch.outer(torch.arange(1.0, 4.0), torch.ones(2)) for size in (1, 2, 3)]
    expected = baselines.predict_change(changes, [0.1, 0.2, 0.3], 0.6, rescale=False)
    pairs = iter([(-1, -1), (1, 1), (-1, -1)])
    original = baselines.leading_direction

    def flipped(change):
        signs = next(pairs)
        return tuple(sign * part for sign, part in zip(signs, original(change), strict=True))

    monkeypatch.setattr(baselines, "leading_direction", flipped)
    torch.testing.assert_close(baselines.predict_change(changes, [0.1, 0.2, 0.3], 0.6, rescale=False), expected)


def test_rescaling_gives_the_rank_one_part_the_norm_of_the_whole_change():
    change = torch.randn(6, 4)
    predicted = baselines.predict_change([0.5 * change, change], [0.1, 0.2], 0.2, rescale=True)
    torch.testing.assert_close(predicted.norm(), change.norm())
    assert torch.linalg.matrix_rank(predicted) == 1


def test_constant_scores_leave_the_last_vector():
    vectors = torch.randn(3, 5, dtype=torch.float64)
    constant = torch.full((3,), 0.4, dtype=torch.float64)
    assert torch.equal(baselines.predict_vector(vectors, constant, 0.9), vectors[-1])


class Rising(Score):
    """Grows by one per call."""

    calls = 0

    def __call__(self, trainer, module):
        self.calls += 1
        return float(self.calls)


def test_alphaopd_jumps_once_and_moves_matrices_only(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    callback = baselines.AlphaOPD(Rising(), target=6.0, steps=(1, 2, 3))
    before = {}
    callback._jump, jump = lambda: before.update(weights_of(module)) or jump(), callback._jump
    make_trainer(tmp_path, 3, callbacks=[callback]).fit(module, make_data())
    after = weights_of(module)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and moved == {name.removeprefix("student.") for name in callback.weights}
    assert all("embed" not in name and "norm" not in name for name in moved)
    assert callback.last_search.accepted and callback.last_search.step == 3 and callback.scores == [1, 2, 3]


def test_exopd_with_scale_one_is_opd_bit_for_bit():
    teacher, reference = random_scores(0), random_scores(1)
    mixed = baselines.extrapolate_scores(teacher, reference, torch.zeros(4, dtype=torch.long), 1.0)
    assert torch.equal(mixed.full(), teacher.full())


@pytest.mark.parametrize("scale", [0.5, 1.25, 1.5])
def test_exopd_with_the_teacher_as_reference_is_opd(scale):
    teacher = random_scores(0)
    mixed = baselines.extrapolate_scores(teacher, teacher, torch.zeros(4, dtype=torch.long), scale)
    torch.testing.assert_close(mixed.full(), teacher.full())


def test_exopd_with_scale_zero_pulls_to_the_reference():
    teacher, reference = random_scores(0), random_scores(1)
    mixed = baselines.extrapolate_scores(teacher, reference, torch.zeros(4, dtype=torch.long), 0.0)
    torch.testing.assert_close(mixed.full(), reference.full())


def test_exopd_has_the_gradient_of_the_published_advantage_and_its_fixed_point():
    scale, teacher, reference, student = 1.25, random_scores(0), random_scores(1), random_scores(2)
    ids = torch.zeros(4, dtype=torch.long)
    tokens = ResponseTokens(ids, torch.zeros(4), ids)
    target = baselines.extrapolate_scores(teacher, reference, ids, scale)

    def gradient(logits):
        logits = logits.clone().requires_grad_()
        DivergenceObjective().token_losses(logits, target, tokens).sum().backward()
        return logits.grad

    logits = student.full().clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    advantage = scale * (teacher.full() - reference.full()) - (log_p - reference.full())
    (-(log_p.exp() * advantage).detach() * log_p).sum().backward()
    torch.testing.assert_close(gradient(student.full()).double(), logits.grad, rtol=1e-5, atol=1e-6)
    assert gradient(target.full()).abs().max() < 1e-6


def test_a_run_with_scale_one_equals_plain_opd(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    weights = []
    for is_wrapped in (False, True):
        teacher = HFTeacher(str(tiny_teacher_folder), dtype="float32")
        if is_wrapped:
            teacher = baselines.ExOPDTeacher(teacher, HFTeacher(str(tiny_qwen3_folder), dtype="float32"), 1.0)
        module = make_module(tiny_qwen3_folder, tiny_teacher_folder, teacher_object=teacher)
        make_trainer(tmp_path, 2).fit(module, make_data())
        weights.append(weights_of(module))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
