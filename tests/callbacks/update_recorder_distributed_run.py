"""Run by test_update_recorder_distributed.py as a program of its own: a recorded fit, stopped and resumed."""

import sys
from pathlib import Path

import torch
from effopd_distributed_run import Regression, whole
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist

from opd_lightning import UpdateRecorder

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend="gloo"
    ),
}


def fit(kind, folder, steps, ckpt_path=None, save=None, others=()):
    recorder = UpdateRecorder(every_n_steps=2, matrices=r"net\.(2|4)\.", dirpath=str(folder), dtype="float32")
    module = Regression(sharded=kind == "fsdp")
    start = {name: whole(weight) for name, weight in module.named_parameters()}
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if kind == "single" else 2,
        strategy=STRATEGIES[kind](),
        max_steps=steps,
        callbacks=[recorder, *others],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return trainer, {name: whole(weight) - start[name] for name, weight in module.named_parameters()}


def main(kind, root):
    root = Path(root)
    trainer, changes = fit(kind, root / kind, 5)
    if trainer.is_global_zero:
        torch.save(changes, root / f"{kind}.pt")
    if kind == "ddp":
        trainer, changes = fit(kind, root / "average", 5, others=[EMAWeightAveraging(decay=0.5)])
        if trainer.is_global_zero:
            torch.save(changes, root / "average.pt")
    if kind != "single":
        fit(kind, root / f"{kind}-again", 3, save=root / f"{kind}.ckpt")
        fit(kind, root / f"{kind}-again", 5, ckpt_path=root / f"{kind}.ckpt")
        dist.barrier()  # who ends first must not take the others' connections with it


if __name__ == "__main__":
    main(*sys.argv[1:])
