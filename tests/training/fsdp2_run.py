"""Run by test_fsdp2.py as a program of its own: runs on one process or on two that share the student; writes files."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from toys import LetterTask, adamw, make_data, make_module, make_trainer
from weighted_run import Fading

from opd_lightning import (
    EffOPD,
    FSDP2Strategy,
    HFTeacher,
    LoraSettings,
    MixtureTeacher,
    Reuse,
    Routed,
    Task,
    WholeCheckpoints,
)
from opd_lightning.callbacks.effopd_scores import TeacherKL
from opd_lightning.callbacks.token_recorder import TokenRecorder
from opd_lightning.distributed import gather_objects, gathered, is_sharded, local_part


class Questions(Task):
    """Nothing is marked, so held-out answers are compared with the teacher; one process has none of them."""

    def problems(self, split):
        return LetterTask(num_held_out=1).problems(split)


class Notes(Callback):
    def __init__(self):
        self.metrics, self.numbers, self.held = [], [], []

    def on_train_start(self, trainer, pl_module):
        if isinstance(pl_module.teacher, HFTeacher):
            body = pl_module.teacher._model.get_decoder()
            self.held = gather_objects(sum(local_part(weight).nbytes for weight in body.parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.numbers.append(gather_objects(len(pl_module.make_micro_batches(batch.rollouts))))


class Runs:
    """Fits on so many processes."""

    def __init__(self, num_processes, student, teacher, output):
        self.num_processes, self.student, self.teacher, self.output = num_processes, student, teacher, Path(output)

    def fit(self, name, steps, *, callbacks=(), ckpt_path=None, save=None, held_out=True, data=None, **options):
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
        trainer.fit(module, make_data(**({"task": LetterTask(num_held_out=5)} | (data or {}))), ckpt_path=ckpt_path)
        assert is_sharded(module.model) == (self.num_processes > 1)
        if save is not None:
            trainer.save_checkpoint(save)
        self.note(trainer, module, name, notes)

    def note(self, trainer, module, name, notes):
        weights = {name: gathered(weight).detach().clone() for name, weight in module.student.named_parameters()}
        plain = dict(module.spec.named_weights(module.model))  # what vLLM is given
        if trainer.is_global_zero:
            cosines = [each.last_search.cosine for each in trainer.callbacks if isinstance(each, EffOPD)]
            torch.save({"weights": weights, "plain": plain, "cosines": cosines}, self.output / f"{name}.pt")
            (self.output / f"{name}.json").write_text(json.dumps([notes.metrics, notes.numbers, notes.held]))


def search():
    return EffOPD(TeacherKL(num_prompts=3), schedule=2)


def lora(runs):
    settings = {"lora": LoraSettings(r=4, dropout=0.5), "gradient_checkpointing": True}
    weighted = {"token_weighting": Fading("kept_tokens"), "optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}
    runs.fit("lora", 2, held_out=False, student_options=settings, callbacks=[TokenRecorder(1)], **weighted)


def several(runs):
    """Teachers that are cut up, whole and offloaded; some have nothing to score on a process."""
    folder = str(runs.teacher)
    both = {"a": HFTeacher(folder), "b": HFTeacher(folder, sharded=False)}
    teachers = {"both": MixtureTeacher(both), "away": HFTeacher(folder, offload=True)}
    routed = Routed(teachers, column="level", routes={"2": "away"}, default="both")
    runs.fit("several", 2, callbacks=[search()], teacher_object=routed, data={"task": Questions()})


def reused(runs):
    """Scores are kept over the passes of a round."""
    runs.fit("reused", 2, held_out=False, data={"source": Reuse(mini_batches=2, passes=2)})


def main(num_processes, student, teacher, output):
    runs, saved = Runs(num_processes, student, teacher, output), Path(output).parent / "search.ckpt"
    runs.fit("step", 1, held_out=False)
    lora(runs)
    several(runs)
    reused(runs)
    settings = {"optimizer": adamw, "gradient_clip_norm": 0.1}
    runs.fit("search", 5, callbacks=[search()], **settings)
    if num_processes > 1:
        runs.fit("first", 3, callbacks=[search()], save=saved, **settings)
    runs.fit("resumed", 5, callbacks=[search()], ckpt_path=saved, **settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
