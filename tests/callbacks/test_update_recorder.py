"""Records are the updates, at the chosen steps, in any Lightning project, and a resumed run's are the same."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from opd_lightning.callbacks.update_recorder import UpdateRecorder
from opd_lightning.training.run_points import find_updates

NAME = "mlp.weight"


class Plain(LightningModule):
    """Anybody's module: one matrix, one bias, one frozen matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = torch.nn.Linear(6, 5)
        self.mlp_frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.mlp(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.mlp.parameters(), lr=1e-3)


def fit(folder, recorder, steps=9, ckpt_path=None):
    module = Plain()
    start = module.mlp.weight.detach().clone()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).repeat(
        5, 1
    )  # whichever comes next, the same
    trainer.fit(module, DataLoader(batches, batch_size=4), ckpt_path=ckpt_path)
    return trainer, module.mlp.weight.detach() - start


def steps_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_powers_of_two_and_the_last_step_in_bfloat16(tmp_path):
    _, change = fit(tmp_path, UpdateRecorder())
    folder = tmp_path / "updates"
    assert steps_of(folder) == ["start", *(f"step={step:06d}" for step in (1, 2, 4, 8, 9))]
    (record,) = (folder / "step=000009").iterdir()
    stored = load_file(record)
    assert stored.keys() == {NAME} and torch.equal(stored[NAME], change.bfloat16())
    assert record.stat().st_size < 2 * change.numel() + 200  # two bytes a weight, and a header
    updates = find_updates(str(tmp_path))
    assert updates.steps == [1, 2, 4, 8, 9] and torch.equal(updates.update(4, NAME), change.bfloat16().double())


class Thawing(UpdateRecorder):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.mlp_frozen.requires_grad_(batch_idx > 0)


def test_weights_that_are_trained_later_are_not_recorded(tmp_path):
    fit(tmp_path, Thawing(), steps=2)
    assert load_file(next((tmp_path / "updates" / "step=000002").iterdir())).keys() == {NAME}


def test_a_resumed_run_records_what_an_uninterrupted_one_does(tmp_path):
    fit(tmp_path / "whole", UpdateRecorder(every_n_steps=2, dtype="float32"))
    trainer, _ = fit(tmp_path / "parts", UpdateRecorder(every_n_steps=2, dtype="float32"), steps=5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path / "elsewhere", UpdateRecorder(every_n_steps=2, dtype="float32"), ckpt_path=tmp_path / "x.ckpt")
    assert not (tmp_path / "elsewhere" / "updates").exists()  # it went on beside the earlier ones
    whole, parts = (find_updates(str(tmp_path / each)) for each in ("whole", "parts"))
    assert whole.steps == [2, 4, 6, 8, 9] and parts.steps == [2, 4, 5, 6, 8, 9]  # 5 was the last step of a part
    for i, step in enumerate(whole.steps):
        assert torch.equal(whole.update(i, NAME), parts.update(parts.steps.index(step), NAME))


def test_the_number_of_records_is_bounded_but_for_the_last(tmp_path):
    with pytest.warns(UserWarning, match="max_records: 2 steps are recorded; from here on only the last"):
        fit(tmp_path, UpdateRecorder(every_n_steps=1, max_records=2))
    assert steps_of(tmp_path / "updates") == ["start", "step=000001", "step=000002", "step=000009"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"UpdateRecorder.every_n_steps: expected at least 1, got 0"):
        UpdateRecorder(every_n_steps=0)
    with pytest.raises(ValueError, match=r"UpdateRecorder.matrices: expected a regular expression, got '\('"):
        UpdateRecorder(matrices="(")
    with pytest.raises(ValueError, match=r"dtype: expected bfloat16 or float32, got 'int8'"):
        UpdateRecorder(dtype="int8")
    with pytest.raises(ValueError, match=r"matrices: 'frozen' is found in no name .* like mlp.weight"):
        fit(tmp_path, UpdateRecorder(matrices="frozen"))
    trainer, _ = fit(tmp_path, UpdateRecorder(), steps=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"updates' is not empty, and records of two runs"):
        fit(tmp_path, UpdateRecorder())
    moved = UpdateRecorder(dirpath=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"first weights, and they are not in '.*elsewhere/start'. Set dirpath"):
        fit(tmp_path, moved, ckpt_path=tmp_path / "x.ckpt")


def test_callbacks_in_the_wrong_order_and_flat_weights_are_refused():
    recorder, average = UpdateRecorder(), EMAWeightAveraging()
    with pytest.raises(ValueError, match=r"WeightAveraging .* stands before it, .* Name UpdateRecorder first"):
        recorder.setup(SimpleNamespace(callbacks=[average, recorder], strategy=None), Plain(), "fit")
    trainer = SimpleNamespace(callbacks=[recorder, average], strategy=FSDPStrategy())
    with pytest.raises(
        ValueError, match=r"UpdateRecorder: FSDPStrategy keeps flat .* Use a single device, DDP, or FSD"
    ):
        recorder.setup(trainer, Plain(), "fit")


def test_what_a_killed_run_left_half_written_is_no_record(tmp_path):
    fit(tmp_path, UpdateRecorder())
    (tmp_path / "updates" / "step=000009").rename(tmp_path / "updates" / "step=000009.part")
    assert find_updates(str(tmp_path)).steps == [1, 2, 4, 8]
