"""Run by test_learning_rate_search_distributed.py as a program of its own: a fit on one or two processes."""

import json
import sys
from pathlib import Path

import torch
from effopd_distributed_run import Regression, make_loader, whole
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from opd_lightning import HeldOutLoss, LearningRateLineSearch

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend="gloo"
    ),
}


class Slow(Regression):
    """Starts at a rate that is far too small."""

    def configure_optimizers(self):
        return torch.optim.SGD([weight for weight in self.net.parameters() if weight.requires_grad], lr=1e-4)


def main(kind, folder):
    # five batches on two processes: one of them scores a batch only to keep pace
    search = LearningRateLineSearch(HeldOutLoss(make_loader(5, seed=9), num_batches=5))
    module = Slow(sharded=kind == "fsdp")
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if kind == "single" else 2,
        strategy=STRATEGIES[kind](),
        max_steps=4,
        callbacks=[search],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module)
    found = search.last_search.found
    facts = {"rate": trainer.optimizers[0].param_groups[0]["lr"], "scores": [trial.score for trial in found.trials]}
    (Path(folder) / f"{kind}-{trainer.global_rank}.json").write_text(json.dumps(facts))
    weights = {name: whole(weight) for name, weight in module.named_parameters()}
    torch.save(weights, Path(folder) / f"{kind}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
