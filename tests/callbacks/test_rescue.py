"""What is rescued resumes exactly; what could not is not saved, and said."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning import EffOPD
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


def test_half_a_step_is_not_saved(tmp_path, folders):
    with (
        pytest.warns(UserWarning, match="no rescue is saved, since a step had changed the weights"),
        pytest.raises(SystemExit),
    ):
        fit(tmp_path, folders, callbacks=[RescueCheckpoint()], optimizer=lambda p: InterruptedStep(p, lr=0.1))
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
    with pytest.warns(UserWarning, match="resume with --ckpt_path"), pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=[Note(), DuringValidation(2), RescueCheckpoint()], **VALIDATION)
    (path,) = rescued(tmp_path)
    resumed = fit(tmp_path, folders, callbacks=[Note()], ckpt_path=path, **VALIDATION)
    assert seen == expected
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(resumed).items())


def test_averaged_weights_are_not_saved_as_if_they_were_trained(tmp_path, folders):
    callbacks = [EMAWeightAveraging(decay=0.5), DuringValidation(2), RescueCheckpoint()]
    with pytest.warns(UserWarning, match="no rescue is saved, since averaged weights"), pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=callbacks, **VALIDATION)
    assert rescued(tmp_path) == []


@pytest.mark.parametrize("rescue_first", [True, False])
def test_an_interrupted_search_is_not_saved(tmp_path, folders, rescue_first):
    scores = iter([0.0, 0.0, 0.0])

    def score(module):
        value = next(scores, None)
        if value is None:
            raise KeyboardInterrupt
        return value

    callbacks = [RescueCheckpoint(), EffOPD(score, schedule=[2, 4], candidates=(1.0, 2.0))]
    with pytest.warns(UserWarning, match="no rescue is saved, since a search"), pytest.raises(SystemExit):
        fit(tmp_path, folders, callbacks=callbacks if rescue_first else callbacks[::-1])
    assert rescued(tmp_path) == []
