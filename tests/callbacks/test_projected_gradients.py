"""Weights move only in their early directions, in any Lightning project, and a resumed run knows which."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from opd_lightning.callbacks.projected_gradients import ProjectedGradients


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mlp = torch.nn.Linear(6, 5)
            self.head = torch.nn.Linear(5, 3)
        self.weights = []

    def training_step(self, batch, batch_idx):
        self.weights.append(self.mlp.weight.detach().clone())
        return (self.head(self.mlp(batch).tanh()) - batch[:, :3] ** 2).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def loader():
    batches = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1)).expand(8, 4, 6)  # in any order alike
    return torch.utils.data.DataLoader(batches, batch_size=None)


def make_trainer(folder, steps, *callbacks):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )


def fit(folder, steps, *callbacks, ckpt_path=None):
    module = Regression()
    make_trainer(folder, steps, *callbacks).fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_after_some_steps_every_change_lies_in_the_early_directions(tmp_path):
    module = fit(tmp_path / "run", 8, ProjectedGradients(after_steps=3, k=2, matrices="mlp"))
    weights = [*module.weights, module.mlp.weight.detach()]
    _, _, right = torch.linalg.svd(weights[3] - weights[0])
    basis = right[:2].T
    late = weights[-1] - weights[3]
    assert late.norm() > 0.01
    torch.testing.assert_close(late @ basis @ basis.T, late, atol=1e-5, rtol=1e-4)
    free = fit(tmp_path / "free", 8)
    assert all(torch.equal(*pair) for pair in zip(module.weights[:4], free.weights[:4], strict=True))
    late = free.mlp.weight.detach() - free.weights[3]
    assert (late @ basis @ basis.T - late).norm() > 0.01 * late.norm()


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_is_the_same_run(tmp_path, stop):
    settings = {"after_steps": 3, "k": 1, "matrices": "mlp"}
    whole = fit(tmp_path / "whole", 7, ProjectedGradients(**settings))
    resumed = fit(
        tmp_path / "resumed", 7, ProjectedGradients(**settings), ckpt_path=tmp_path / "whole" / f"step={stop}.ckpt"
    )
    assert torch.equal(whole.mlp.weight, resumed.mlp.weight)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_second_fit_goes_on_with_the_early_directions(tmp_path, stop):
    whole = fit(tmp_path / "whole", 7, ProjectedGradients(after_steps=3, k=1, matrices="mlp"))
    trainer, module = make_trainer(tmp_path, stop, ProjectedGradients(after_steps=3, k=1, matrices="mlp")), Regression()
    for steps in (stop, 7):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(module, loader())
    assert torch.equal(whole.mlp.weight, module.mlp.weight)


class Thaws(Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.head.weight.requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.head.weight.requires_grad_(batch_idx > 3)


def test_weights_that_are_trained_later_are_left_alone(tmp_path):
    frozen = fit(tmp_path, 4, Thaws(), ProjectedGradients(after_steps=2, k=1, matrices="mlp|head"))
    thawed = fit(tmp_path / "on", 6, Thaws(), ProjectedGradients(after_steps=2, k=1, matrices="mlp|head"))
    assert torch.linalg.matrix_rank(thawed.head.weight - frozen.head.weight, atol=1e-6) > 1


def test_a_run_whose_start_or_whose_matrices_are_not_known_is_refused(tmp_path):
    fit(tmp_path, 4)
    with pytest.raises(ValueError, match=r"ProjectedGradients: the run has made 4 steps without it"):
        fit(tmp_path, 6, ProjectedGradients(matrices="mlp"), ckpt_path=tmp_path / "step=4.ckpt")
    fit(tmp_path / "mlp", 4, ProjectedGradients(after_steps=2, matrices="mlp"))
    with pytest.raises(ValueError, match=r"'mlp|head' chooses other weights than when the run began \('head\.weight'"):
        fit(tmp_path, 6, ProjectedGradients(matrices="mlp|head"), ckpt_path=tmp_path / "mlp" / "step=4.ckpt")


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"ProjectedGradients\.k: expected at least 1, got 0"):
        ProjectedGradients(k=0)
    with pytest.raises(ValueError, match=r"ProjectedGradients\.matrices: expected a regular expression, got '\('"):
        ProjectedGradients(matrices="(")
    with pytest.raises(ValueError, match=r"ProjectedGradients\.matrices: 'nobody' is found in no name"):
        fit(tmp_path, 1, ProjectedGradients(matrices="nobody"))
