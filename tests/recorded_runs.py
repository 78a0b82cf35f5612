"""Folders of real runs of tiny models, a few steps each, made once per test session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from toys import adamw, make_data, make_module, make_trainer

from opd_lightning import EffOPD
from opd_lightning.callbacks.held_out_marks import HeldOutMarks
from opd_lightning.training.metrics_file import WholeCSVLogger

SETTINGS = {
    "seed_everything": 0,
    "model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}},
    "data": {"prompts_per_step": 4, "rollouts_per_prompt": 2},
    "trainer": {"callbacks": [{"class_path": "opd_lightning.EffOPD", "init_args": {"schedule": [2]}}]},
    "ckpt_path": None,
}


def slower(parameters):
    return torch.optim.AdamW(parameters, lr=1e-4)


def record(folder: Path, models: tuple[Path, Path], *, optimizer=adamw, rate: float = 0.01, steps: int = 3) -> Path:
    """Train some steps with a search after the second, a validation after each, and leave what a run leaves."""
    weights: list[float] = []

    def score(module):
        weights.append(0.0)
        return -abs(len(weights) - 3)  # two candidates are better than standing still, the third is worse

    module, data = make_module(*models, optimizer=optimizer), make_data()
    logger = WholeCSVLogger(folder, name=None, version="")
    options = {
        "log_every_n_steps": 1,
        "limit_val_batches": 1.0,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
    }
    search = EffOPD(score, schedule=[2], candidates=(1.0, 2.0, 4.0))
    make_trainer(folder, steps, logger=logger, callbacks=[search, HeldOutMarks()], **options).fit(module, data)
    settings = yaml.safe_load(yaml.safe_dump(SETTINGS))
    settings["model"]["optimizer"]["init_args"]["lr"] = rate
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="session")
def recorded(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder) -> tuple[Path, Path]:
    """Two runs that differ in their learning rate. Read them, do not write into them."""
    root, models = tmp_path_factory.mktemp("runs"), (tiny_qwen3_folder, tiny_teacher_folder)
    return record(root / "fast", models), record(root / "slow", models, optimizer=slower, rate=1e-4)


@pytest.fixture
def copied(recorded, tmp_path) -> tuple[Path, Path]:
    """Copies of the two, to write into."""
    return tuple(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in recorded)
