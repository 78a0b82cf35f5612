"""What is rescued resumes exactly; what could not is not saved, and said."""

import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning import EffOPD, LearningRateLineSearch
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.callbacks.start_validation import StartValidation

VALIDATION = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def fit(folder, folders, *, callbacks=(), steps=5, ckpt_path=None, optimizer=adamw, **options):
    module = make_module(*folders, optimizer=optimizer)
    trainer = make_trainer(folder, steps, callbacks=list(callbacks), **options)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return module


def rescued(folder):
    return list(folder.rglob("rescue.ckpt"))


class InterruptedStep(torch.optim.SGD):
    """Changes some weights, then is interrupted."""

    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        if self.num_steps == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(100)
            raise KeyboardInterrupt
        super().step(closure)


def test_half_a_step_is_not_saved(tmp_path, folders, capsys):
    with pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=[RescueCheckpoint()], optimizer=lambda p: InterruptedStep(p, lr=0.1))
    assert "no rescue is saved, since a step had changed the weights" in capsys.readouterr().out
    assert rescued(tmp_path) == []


class DuringValidation(Callback):
    """Stops the run inside the validation after some step."""

    def __init__(self, after_step):
        self.after_step = after_step

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.after_step:
            raise SIGTERMException


def test_a_stop_during_validation_is_rescued_and_the_validation_repeated(tmp_path, folders):
    seen = []

    class Note(StartValidation):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            seen.append((trainer.global_step, float(trainer.callback_metrics["val/response_length"])))

    whole = fit(tmp_path / "whole", folders, callbacks=[Note()], **VALIDATION)
    expected, seen[:] = list(seen), []
    with pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=[Note(), DuringValidation(2), RescueCheckpoint()], **VALIDATION)
    (path,) = rescued(tmp_path)
    resumed = fit(tmp_path, folders, callbacks=[Note()], ckpt_path=path, **VALIDATION)
    assert seen == expected
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(resumed).items())


def test_averaged_weights_are_not_saved_as_if_they_were_trained(tmp_path, folders, capsys):
    callbacks = [EMAWeightAveraging(decay=0.5), DuringValidation(2), RescueCheckpoint()]
    with pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=callbacks, **VALIDATION)
    assert "no rescue is saved, since averaged weights" in capsys.readouterr().out
    assert rescued(tmp_path) == []


def test_weights_that_diverged_are_not_saved_and_the_last_good_ones_are_named(tmp_path, folders, capsys):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.step == 3:
                next(iter(pl_module.student.parameters())).data.fill_(torch.nan)
                raise RuntimeError("the machine is broken")

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    with pytest.raises(RuntimeError, match="is broken"):
        fit(tmp_path, folders, callbacks=[Spoil(), saver, RescueCheckpoint()], enable_checkpointing=True)
    assert rescued(tmp_path) == []
    said = capsys.readouterr().out
    assert "no rescue is saved, since the weights have diverged (student.model.embed_tokens.weight)" in said
    assert f"The last checkpoint with usable weights is {tmp_path / 'saved' / 'step=2.ckpt'}: resume from it" in said


def test_a_step_that_fails_by_its_numbers_is_not_called_a_way_on(tmp_path, folders, capsys):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.step == 3:
                raise FloatingPointError("not finite")

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(tmp_path, folders, callbacks=[Break(), saver, RescueCheckpoint()], enable_checkpointing=True)
    (path,) = rescued(tmp_path)
    expected = rf"{path} holds step 3, which fails\. The last checkpoint with usable weights is .*step=2\.ckpt: resume"
    assert re.search(expected, capsys.readouterr().out)


@pytest.mark.parametrize(("kind", "rescue_first"), [(EffOPD, True), (EffOPD, False), (LearningRateLineSearch, True)])
def test_an_interrupted_search_is_not_saved(tmp_path, folders, kind, rescue_first, capsys):
    scores = iter([0.0, 0.0, 0.0])

    def score(module):
        value = next(scores, None)
        if value is None:
            raise KeyboardInterrupt
        return value

    options = {"schedule": [2, 4], "candidates": (1.0, 2.0)} if kind is EffOPD else {}
    callbacks = [RescueCheckpoint(), kind(score, **options)]
    with pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=callbacks if rescue_first else callbacks[::-1])
    assert "no rescue is saved, since a search" in capsys.readouterr().out
    assert rescued(tmp_path) == []


class Stranger(LightningModule):
    """A module that counts no versions and takes its gradients from two batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Numbers:
    """Six batches, from where a resumed run has stopped."""

    def __init__(self):
        self.position = 0

    def __len__(self):
        return 6

    def __iter__(self):
        while self.position < 6:
            self.position += 1
            yield torch.randn(2, 3, generator=torch.Generator().manual_seed(self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class StopsAt(Callback):
    """Ends the run in a hook of some batch."""

    def __init__(self, hook, batch_idx):
        setattr(self, hook, self.stop)
        self.batch_idx = batch_idx

    def stop(self, trainer, pl_module, *rest):
        if rest[-1] == self.batch_idx:
            raise RuntimeError("stopped")


def fit_stranger(folder, *callbacks, ckpt_path=None):
    module = Stranger()
    trainer = make_trainer(folder, -1, callbacks=list(callbacks), max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, Numbers(), ckpt_path=ckpt_path)
    return module


def test_in_the_middle_of_an_accumulation_any_module_goes_back_to_its_beginning(tmp_path):
    whole = fit_stranger(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        fit_stranger(tmp_path, StopsAt("on_train_batch_start", 3), RescueCheckpoint())
    (path,) = rescued(tmp_path)
    assert torch.equal(fit_stranger(tmp_path, ckpt_path=path).layer.weight, whole.layer.weight)


def test_a_step_made_by_any_module_is_not_made_twice(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="stopped"):
        fit_stranger(tmp_path, StopsAt("on_train_batch_end", 3), RescueCheckpoint())
    assert "no rescue is saved, since a step had changed the weights" in capsys.readouterr().out
    assert rescued(tmp_path) == []


def test_a_mistake_found_before_anything_is_set_up_stays_the_error():
    trainer = SimpleNamespace(world_size=2, global_rank=1)
    RescueCheckpoint().on_exception(trainer, None, ValueError("a setting"))  # raises nothing of its own
