"""The identities that make AlphaOPD what it claims to be."""

import effopd_baselines as baselines
import pytest
import torch
from toys import make_data, make_module, make_trainer, weights_of

from opd_lightning.interfaces import Score


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
