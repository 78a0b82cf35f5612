"""Run by test_distributed.py as a program of its own: a short training run on some processes, its results in a file."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from toys import CopyEngine, LetterTask, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import LoraSettings
from opd_lightning.callbacks.token_recorder import TokenRecorder
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.rollouts.reuse import Reuse
from opd_lightning.selection import DifficultyPool


class Notes(Callback):
    def __init__(self):
        self.metrics, self.seeds = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.seeds.append([rollout.seed for rollout in batch.rollouts])


def make_strategy(num_processes):
    return DDPStrategy(process_group_backend="gloo") if num_processes > 1 else "auto"


def main(num_processes, student, teacher, output):
    output = Path(output)
    notes = Notes()
    options = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(
        output,
        4,
        devices=num_processes,
        strategy=make_strategy(num_processes),
        callbacks=[notes, TokenRecorder(2)],
        **options,
    )
    small_steps = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    module = make_module(student, teacher, max_tokens_per_micro_batch=64, **small_steps)
    data = make_data(task=LetterTask(num_held_out=5), selector=DifficultyPool())
    trainer.fit(module, data)
    facts = {"metrics": notes.metrics, "seeds": notes.seeds, "selector": repr(data.selector.state_dict())}
    (output / f"rank{trainer.global_rank}.json").write_text(json.dumps(facts))
    torch.save(weights_of(module), output / f"rank{trainer.global_rank}.pt")
    run_and_resume("ahead", OneStepAhead, num_processes, student, teacher, output)
    run_and_resume("reuse", lambda: Reuse(2, 2, max_kl=10.0), num_processes, student, teacher, output)
    run_dropout(num_processes, student, teacher, output)


def run_dropout(num_processes, student, teacher, output):
    """An adapter with dropout: which process trains a rollout must not change what is dropped."""
    torch.manual_seed(0)  # a new adapter is drawn from the global generator
    trainer = make_trainer(output, 3, devices=num_processes, strategy=make_strategy(num_processes))
    module = make_module(
        student,
        teacher,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        student_options={"lora": LoraSettings(r=4, dropout=0.5)},
    )
    trainer.fit(module, make_data())
    torch.save(weights_of(module), output / f"dropout_rank{trainer.global_rank}.pt")


def run_and_resume(source, make_source, num_processes, student, teacher, output):
    """With a source that holds rollouts: a whole run, and one that is stopped and resumed."""
    first = output / f"{source}_first.ckpt"
    for name, steps, checkpoint in (("whole", 4, None), ("first", 2, None), ("resumed", 4, first)):
        trainer = make_trainer(output, steps, devices=num_processes, strategy=make_strategy(num_processes))
        module = make_module(student, teacher, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        trainer.fit(module, make_data(engine=CopyEngine(), source=make_source()), ckpt_path=checkpoint)
        trainer.save_checkpoint(output / f"{source}_{name}.ckpt")
        torch.save(weights_of(module), output / f"{source}_{name}_rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
