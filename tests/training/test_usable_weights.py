"""A run that diverges keeps its last good checkpoint, names it, and goes on from it at another learning rate."""

import os
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from toys import make_data, make_module, make_trainer

from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.training.checkpoints import WholeCheckpoints
from opd_lightning.training.usable_weights import last_checkpoint, last_usable_checkpoint, unusable_weight


@pytest.mark.parametrize(
    ("value", "dtype", "is_usable"),
    [
        (1.0, torch.float32, True),
        (1e4, torch.bfloat16, True),
        (torch.nan, torch.float32, False),
        (-torch.inf, torch.bfloat16, False),
        (1e30, torch.float32, False),  # finite, but its square is not
        (1e30, torch.bfloat16, False),
    ],
)
def test_weights_that_have_diverged(value, dtype, is_usable):
    weights = [("good", torch.ones(3)), ("steps", torch.tensor(7)), ("maybe", torch.tensor([1, value], dtype=dtype))]
    assert unusable_weight(weights) == (None if is_usable else "maybe")


def test_the_last_checkpoint_is_named_where_nothing_more_can_be_saved(tmp_path):
    trainer = make_trainer(tmp_path, 1, callbacks=[ModelCheckpoint(dirpath=tmp_path)], enable_checkpointing=True)
    assert last_checkpoint(trainer) == "There is no checkpoint yet: start again."
    for age, name in ((2, "old.ckpt"), (1, "new.ckpt")):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (0, 100 - age))
    assert last_checkpoint(trainer) == f"Resume from the last checkpoint, {tmp_path / 'new.ckpt'}."
    (tmp_path / "last.ckpt").symlink_to("new.ckpt")
    assert last_checkpoint(trainer) == f"Resume from the last checkpoint, {tmp_path / 'last.ckpt'}."


class RisingRate(torch.optim.SGD):
    """Takes good steps, then one at learning rate 1e30."""

    def __init__(self, parameters, lr, good_steps):
        super().__init__(parameters, lr=lr)
        self.good_steps, self.num_steps = good_steps, 0

    def step(self, closure=None):
        self.num_steps += 1
        if self.num_steps > self.good_steps:
            self.param_groups[0]["lr"] = 1e30
        super().step(closure)


def fit(tmp_path, folders, steps=8, good_steps=3, every=1, ckpt_path=None, **options):
    module = make_module(*folders, optimizer=lambda p: RisingRate(p, 1e-2, good_steps), max_skipped_steps=2, **options)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=1, save_last="link", filename="{step}")
    trainer = make_trainer(
        tmp_path,
        steps,
        callbacks=[saver, RescueCheckpoint()],
        enable_checkpointing=True,
        plugins=[WholeCheckpoints()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def test_diverged_weights_never_take_the_place_of_good_ones(tmp_path, folders, capsys):
    with pytest.raises(
        FloatingPointError, match=r"have diverged \(student.* not saved\. The last .*step=3\.ckpt: resume"
    ):
        fit(tmp_path, folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=3.ckpt"]
    assert "no rescue is saved, since the weights have diverged" in capsys.readouterr().out


def test_the_way_back_that_is_named_leads_on(tmp_path, folders, capsys):
    with pytest.raises(FloatingPointError, match="student's logits are not finite"):
        fit(tmp_path, folders, every=3)
    path = tmp_path / "step=3.ckpt"
    said = capsys.readouterr().out
    assert (
        f"have diverged (student.model.embed_tokens.weight). The last checkpoint with usable weights is {path}" in said
    )
    module, trainer = fit(
        tmp_path,
        folders,
        steps=5,
        good_steps=99,
        ckpt_path=path,
        override_optimizer_on_resume=True,
    )
    assert trainer.global_step == 5 and unusable_weight(module.named_parameters()) is None


def test_without_a_good_checkpoint_it_says_start_again(tmp_path, folders):
    with pytest.raises(FloatingPointError, match="No earlier checkpoint has usable weights: start again, with a lower"):
        fit(tmp_path, folders, good_steps=0)


def test_damaged_files_later_steps_and_links_are_seen_through(tmp_path, folders):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                found.append(last_usable_checkpoint(trainer))
                (tmp_path / "step=3.ckpt").write_bytes(b"cut short")
                found.append(last_usable_checkpoint(trainer))

    found = []
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last="link", filename="{step}")
    trainer = make_trainer(tmp_path, 4, callbacks=[Stop(), saver], enable_checkpointing=True)
    trainer.fit(make_module(*folders), make_data())
    assert [os.path.basename(path) for path in found] == ["step=3.ckpt", "step=2.ckpt"]
