"""The optimisers of docs/optimizers.md: a resumed run is the uninterrupted one, with EffOPD's searches too."""

import copy

import pytest
import torch
import yaml
from doc_blocks import blocks
from lightning.pytorch import Callback
from toys import make_data, make_module, make_trainer

from opd_lightning.callbacks.effopd import EffOPD

YAML = [block for block in blocks() if block.page == "docs/optimizers.md" and block.language == "yaml"]
OPTIMIZERS = [block.code for block in YAML if "optimizer" in yaml.safe_load(block.code)["model"]]


class Compare(Callback):
    """Remembers the optimiser's state when `before` has seen it last, and compares."""

    def __init__(self, before=None):
        self.before, self.state, self.num_same = before, None, 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.state = copy.deepcopy(trainer.optimizers[0].state_dict())
        if self.before is not None:
            torch.testing.assert_close(self.state, self.before.state, rtol=0, atol=0, equal_nan=True)
            self.num_same += 1


def run(folder, make_optimizer, folders, max_steps, ckpt_path=None):
    torch.manual_seed(len(str(ckpt_path)))
    search = EffOPD(lambda module: float(sum(w.abs().sum() for w in module.parameters())), schedule=1, candidates=(1,))
    before = Compare()
    after = Compare(before)
    module = make_module(*folders, optimizer=make_optimizer)
    trainer = make_trainer(folder, max_steps, callbacks=[before, search, after])
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    assert after.num_same > 0
    return search


@pytest.mark.slow
@pytest.mark.parametrize("code", OPTIMIZERS, ids=lambda code: yaml.safe_load(code)["model"]["optimizer"]["class_path"])
def test_resumed_exactly(code, tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    settings = yaml.safe_load(code)["model"]["optimizer"]
    package, _, name = settings["class_path"].rpartition(".")
    if package.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        settings["init_args"]["min_8bit_size"] = 64  # the models are tiny
    make = getattr(__import__(package, fromlist=[name]), name)
    settings["init_args"]["lr"] = 1e-3

    def make_optimizer(parameters):
        return make(parameters, **settings["init_args"])

    folders = tiny_qwen3_folder, tiny_teacher_folder
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    run(tmp_path / "whole", make_optimizer, folders, 4)
    run(tmp_path / "parts", make_optimizer, folders, 2)
    run(tmp_path / "parts", make_optimizer, folders, 4, ckpt_path=tmp_path / "parts" / "2.ckpt")
    whole, parts = (torch.load(tmp_path / part / "4.ckpt", weights_only=True) for part in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    if "8bit" in name:
        states = whole["optimizer_states"][0]["state"].values()
        assert any("uint8" in str(state) for state in states)
