"""A toy task and short runs for tests that need the whole trainer on tiny real models."""

import copy
from pathlib import Path

import torch
from lightning import Trainer

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.interfaces import Problem, Sampling, Task
from opd_lightning.selection import Shuffled
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule


class CopyEngine(HFEngine):
    """Generates with a copy of the weights, as vLLM does; remembers which versions it was given."""

    generates_apart = True

    def __init__(self):
        super().__init__()
        self.versions, self.failures = [], []

    def sync(self, model, weight_version):
        if weight_version != self.weight_version:
            super().sync(copy.deepcopy(model), weight_version)
            self.versions.append(weight_version)

    def close(self):
        super().close()
        self.weight_version = -1

    def generate(self, prompts, sampling, on_rollout=None):
        if self.failures and (error := self.failures.pop(0)):
            raise error
        rollouts = super().generate(prompts, sampling)
        for rollout in rollouts:
            if on_rollout is not None:
                on_rollout(rollout)
        return rollouts


class LetterTask(Task):
    """Say the letter: right when the response contains it. Prompts of different lengths."""

    def __init__(self, num_train=12, num_held_out=6, sources=("letters",)):
        self.sizes = {"train": num_train, "validation": num_held_out, "test": num_held_out, "predict": num_held_out}
        self.sources = sources

    def problems(self, split):
        letters = "abcdefghijklmnopqrstuvwxyz"
        return [
            Problem(
                uid=f"{split}/{i}",
                messages=({"role": "user", "content": "say " * (1 + i % 3) + letters[i % 26]},),
                answer=letters[i % 26],
                source=self.sources[i % len(self.sources)],
                columns={"level": i % 3},
            )
            for i in range(self.sizes[split])
        ]

    def grade(self, problem, response):
        return float(problem.answer in response)


def sgd(parameters):
    """A step of size 1 shows the gradient as the difference of the weights."""
    return torch.optim.SGD(parameters, lr=1.0)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_module(student: Path, teacher: Path, *, student_options=None, **options):
    settings = {"optimizer": sgd, "gradient_clip_norm": None}
    return OPDModule(
        HFStudent(str(student), **(student_options or {})),
        options.pop("teacher_object", None) or HFTeacher(str(teacher), dtype="float32"),
        **(settings | options),
    )


def make_data(**options):
    settings = {
        "task": LetterTask(),
        "engine": HFEngine(),
        "selector": Shuffled(),
        "sampling": Sampling(max_new_tokens=8),
        "prompts_per_step": 4,
        "rollouts_per_prompt": 2,
    }
    return OPDDataModule(**(settings | options))


def make_trainer(folder: Path, max_steps: int, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return Trainer(**(settings | options))


def weights_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.student.named_parameters()}
