"""Run by test_fsdp2.py as a program of its own: runs on one process or on two that share the student; writes files."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from toys import LetterTask, adamw, make_data, make_module, make_trainer
from weighted_run import Fading

from opd_lightning import EffOPD, FSDP2Strategy, LoraSettings, WholeCheckpoints
from opd_lightning.callbacks.effopd_scores import TeacherKL
from opd_lightning.callbacks.token_recorder import TokenRecorder
from opd_lightning.distributed import gather_objects, gathered, is_sharded


class Notes(Callback):
    def __init__(self):
        self.metrics, self.numbers = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.numbers.append(gather_objects(len(pl_module.make_micro_batches(batch.rollouts))))


class Runs:
    """Fits on so many processes."""

    def __init__(self, num_processes, student, teacher, output):
        self.num_processes, self.student, self.teacher, self.output = num_processes, student, teacher, Path(output)

    def fit(self, name, steps, *, callbacks=(), ckpt_path=None, save=None, held_out=True, **options):
        notes = Notes()
        validation = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer = make_trainer(
            self.output,
            steps,
            devices=self.num_processes,
            strategy=FSDP2Strategy() if self.num_processes > 1 else "auto",
            plugins=[WholeCheckpoints()],
            callbacks=[notes, *callbacks],
            **(validation if held_out else {}),
        )
        torch.manual_seed(0)  # a new adapter is drawn from the global generator
        module = make_module(self.student, self.teacher, **({"max_tokens_per_micro_batch": 64} | options))
        trainer.fit(module, make_data(task=LetterTask(num_held_out=5)), ckpt_path=ckpt_path)
        assert is_sharded(module.model) == (self.num_processes > 1)
        if save is not None:
            trainer.save_checkpoint(save)
        self.note(trainer, module, name, notes)

    def note(self, trainer, module, name, notes):
        weights = {name: gathered(weight).detach().clone() for name, weight in module.student.named_parameters()}
        plain = dict(module.spec.named_weights(module.model))  # what vLLM is given
        if trainer.is_global_zero:
            torch.save({"weights": weights, "plain": plain}, self.output / f"{name}.pt")
            (self.output / f"{name}.json").write_text(json.dumps([notes.metrics, notes.numbers]))


def search():
    return EffOPD(TeacherKL(num_prompts=3), schedule=2)


def main(num_processes, student, teacher, output):
    runs, saved = Runs(num_processes, student, teacher, output), Path(output).parent / "search.ckpt"
    runs.fit("step", 1, held_out=False)
    lora = {"lora": LoraSettings(r=4, dropout=0.5), "gradient_checkpointing": True}
    weighted = {"token_weighting": Fading("kept_tokens"), "optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}
    runs.fit("lora", 2, held_out=False, student_options=lora, callbacks=[TokenRecorder(1)], **weighted)
    settings = {"optimizer": adamw, "gradient_clip_norm": 0.1}
    runs.fit("search", 5, callbacks=[search()], **settings)
    if num_processes > 1:
        runs.fit("first", 3, callbacks=[search()], save=saved, **settings)
    runs.fit("resumed", 5, callbacks=[search()], ckpt_path=saved, **settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
