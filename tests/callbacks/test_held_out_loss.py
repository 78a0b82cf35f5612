"""`HeldOutLoss`, and the callback in YAML."""

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opd_lightning import EffOPD, HeldOutLoss


def make_loader(num, seed=0, **options):
    x = torch.randn(4 * num, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, 2 * x), batch_size=4, **options)


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.noisy = False

    def loss(self, batch):
        x, y = batch
        noise = torch.rand(()) if self.noisy else 0.0
        return nn.functional.mse_loss(self.layer(x), y) + noise

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class WithValidation(Line):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


def fit(path, module, score, validation=None, **options):
    effopd = EffOPD(score, schedule=2, candidates=(1, 2))
    settings = {"accelerator": "cpu", "max_steps": 4, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    Trainer(default_root_dir=path, callbacks=[effopd], **(settings | quiet | options)).fit(
        module, make_loader(8), validation
    )
    return effopd


def expected_baseline(module, batches):
    with torch.no_grad():
        return -sum(float(module.loss(batch)) for batch in batches) / len(batches)


@pytest.mark.parametrize("as_function", [False, True])
def test_is_the_negative_mean_of_the_first_batches(tmp_path, as_function):
    loader, module, seen = make_loader(6, seed=1), Line(), {}
    loss = (lambda module, batch: module.loss(batch)) if as_function else "loss"

    class Watch(HeldOutLoss):
        def __call__(self, trainer, module):
            value = super().__call__(trainer, module)
            seen.setdefault("pair", (value, expected_baseline(module, list(loader)[:4])))
            return value

    fit(tmp_path, module, Watch(loader, loss=loss, num_batches=4))
    assert seen["pair"][0] == pytest.approx(seen["pair"][1], rel=1e-6)


def test_the_same_batches_and_the_same_noise_for_every_candidate(tmp_path):
    module, seen = Line(), []
    module.noisy = True

    def loss(module, batch):
        seen.append((batch[0].clone(), torch.rand(())))
        return module.loss(batch)

    fit(tmp_path, module, HeldOutLoss(make_loader(3, shuffle=True), loss=loss, num_batches=3))
    searches = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(searches) == 6
    for first, later in ((0, 1), (1, 2), (3, 4), (4, 5)):
        for (x, noise), (other_x, other_noise) in zip(searches[first], searches[later], strict=True):
            assert torch.equal(x, other_x)
            assert noise == other_noise
    assert torch.equal(searches[0][0][0], searches[3][0][0])
    assert searches[0][0][1] != searches[3][0][1]  # another search, another draw


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 100}])
def test_takes_the_validation_loader_when_no_batches_are_given(tmp_path, options):
    score = HeldOutLoss(num_batches=2)
    effopd = fit(tmp_path, WithValidation(), score, make_loader(3, seed=5), **options)
    assert effopd.last_search.accepted
    kept = [batch for batch, _ in score._kept]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(kept, list(make_loader(3, seed=5))[:2], strict=True))


@pytest.mark.parametrize(
    ("make_score", "message"),
    [
        (lambda: HeldOutLoss(), "the number of validation loaders is 0. Pass the batches"),
        (lambda: HeldOutLoss([]), "batches: expected at least one held-out batch, got none"),
        (lambda: HeldOutLoss(make_loader(1), loss="los"), "loss: Line has no method 'los'. Name a method"),
        (lambda: HeldOutLoss(make_loader(1), num_batches=0), "num_batches: expected an integer of at least 1, got 0"),
    ],
)
def test_mistakes_are_named(tmp_path, make_score, message):
    module = Line()
    before = module.layer.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, make_score())
    assert torch.equal(module.layer.weight, before)  # found before anything is trained


def test_several_validation_loaders_are_ambiguous(tmp_path):
    class TwoLoaders(Line):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    module = TwoLoaders()
    with pytest.raises(ValueError, match="the number of validation loaders is 2"):
        fit(tmp_path, module, HeldOutLoss(), [make_loader(1), make_loader(1)])
    assert module.global_step == 0


def test_reading_the_batches_early_draws_no_random_number_of_the_run(tmp_path):
    ends = []
    for early in (True, False):
        torch.manual_seed(0)
        module = Line()
        score = HeldOutLoss(make_loader(3, shuffle=True), num_batches=3)
        if not early:
            score.check = lambda trainer, module: None
        Trainer(
            default_root_dir=tmp_path,
            callbacks=[EffOPD(score, schedule=[100])],
            max_steps=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, make_loader(8, shuffle=True))
        ends.append(module.layer.weight.detach().clone())
    assert torch.equal(*ends)


def test_works_from_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[Callback])
    (tmp_path / "config.yaml").write_text(
        """
        callbacks:
        - class_path: opd_lightning.EffOPD
          init_args:
            score:
              class_path: opd_lightning.HeldOutLoss
              init_args: {loss: loss, num_batches: 2}
            schedule: [1, 3]
            candidates: [1, 2]
            backward: [-0.5]
            parameters: weight$
        """
    )
    parsed = parser.parse_args(["--config", str(tmp_path / "config.yaml")])
    (effopd,) = parser.instantiate_classes(parsed).callbacks
    assert isinstance(effopd, EffOPD)
    assert isinstance(effopd.score, HeldOutLoss)
    assert effopd.score.num_batches == 2
    assert effopd.parameters == "weight$"
    assert effopd._extrapolator.line_search.backward == (-0.5,)
    assert effopd._extrapolator.schedule.spec == (1, 3)
