"""Run by test_distributed.py as a program of its own: a short training run on some processes, its results in a file."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from toys import LetterTask, make_data, make_module, make_trainer, weights_of

from opd_lightning.selection import DifficultyPool


class Notes(Callback):
    def __init__(self):
        self.metrics, self.seeds = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.seeds.append([rollout.seed for rollout in batch.rollouts])


def main(num_processes, student, teacher, output):
    output = Path(output)
    notes = Notes()
    strategy = DDPStrategy(process_group_backend="gloo") if num_processes > 1 else "auto"
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(output, 4, devices=num_processes, strategy=strategy, callbacks=[notes], **options)
    small_steps = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    module = make_module(student, teacher, max_tokens_per_micro_batch=64, **small_steps)
    data = make_data(task=LetterTask(num_held_out=5), selector=DifficultyPool())
    trainer.fit(module, data)
    facts = {"metrics": notes.metrics, "seeds": notes.seeds, "selector": repr(data.selector.state_dict())}
    (output / f"rank{trainer.global_rank}.json").write_text(json.dumps(facts))
    torch.save(weights_of(module), output / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
