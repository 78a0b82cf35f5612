import pytest
import torch
from effopd_ideas import AccuracyOnLevels, AlwaysBack, GradientEffOPD, MomentsEffOPD
from toys import make_data, make_module, make_trainer, weights_of

from opd_lightning import EffOPD


def run_with_moves(make, folder, student, teacher):
    """One AdamW step and a search that goes forward; returns callback, module and the weights before."""
    scores = iter((0.0, 1.0))
    callback = make(lambda module: next(scores), schedule=[1], candidates=(2.0,))
    module = make_module(student, teacher, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0))
    before = weights_of_loaded(module, callback)
    make_trainer(folder, 1, callbacks=[callback]).fit(module, make_data())
    return callback, module, before


def weights_of_loaded(module, callback):
    """A dictionary that is filled with the weights once they are loaded."""
    weights = {}
    start = callback.on_train_start

    def remember(trainer, pl_module):
        weights.update(weights_of(pl_module))
        start(trainer, pl_module)

    callback.on_train_start = remember
    return weights


@pytest.mark.parametrize(("forget", "scale"), [(False, 3.0), (True, 0.0)])
def test_moments_move_with_the_weights_or_are_forgotten(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, forget, scale
):
    plain, moved = (
        run_with_moves(make, tmp_path, tiny_qwen3_folder, tiny_teacher_folder)
        for make in (EffOPD, lambda *a, **options: MomentsEffOPD(*a, **options, forget=forget))
    )
    for name, weight in weights_of(plain[1]).items():
        assert torch.equal(weight, weights_of(moved[1])[name])
    states = [list(run[1].trainer.optimizers[0].state.values()) for run in (plain, moved)]
    for expected, found in zip(*states, strict=True):
        torch.testing.assert_close(found["exp_avg"], scale * expected["exp_avg"])
        squares = expected["exp_avg_sq"] * (1 if forget else scale)
        torch.testing.assert_close(found["exp_avg_sq"], squares)


def test_the_gradient_search_goes_down_the_gradient_at_the_length_of_delta(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    gradients = {}

    class Remember(GradientEffOPD):
        def on_train_batch_end(self, *args):
            gradients.update(self.gradients)
            self.stepped = weights_of(args[1])
            super().on_train_batch_end(*args)

    callback, module, before = run_with_moves(Remember, tmp_path, tiny_qwen3_folder, tiny_teacher_folder)
    names = list(before)
    moved, stepped = (
        torch.cat([(a[name] - b[name]).flatten() for name in names])
        for a, b in ((weights_of(module), callback.stepped), (callback.stepped, before))
    )
    gradient = torch.cat([gradients[f"student.{name}"].flatten() for name in names])
    assert callback.last_search.best.factor == 2
    torch.testing.assert_close(moved.norm(), 2 * stepped.norm(), rtol=1e-3, atol=0)
    assert torch.nn.functional.cosine_similarity(moved, -gradient, dim=0) > 0.999


def test_always_back_returns_halfway_at_every_search(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    callback = EffOPD(AlwaysBack(), schedule=1, backward=(-0.5,))
    factors = []
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    search = callback._extrapolator.search
    callback._extrapolator.search = lambda *a, **o: (report := search(*a, **o), factors.append(report.best.factor))[0]
    make_trainer(tmp_path, 3, callbacks=[callback]).fit(module, make_data())
    assert factors == [-0.5] * 3


def test_other_levels_are_scored_than_those_trained_on():
    score = AccuracyOnLevels([3], num_prompts=7)
    assert [problem.columns["level"] for problem in score.problems] == [3] * 7
