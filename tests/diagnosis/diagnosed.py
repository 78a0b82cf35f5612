"""Pairs of tiny models to diagnose, and diagnoses written by hand."""

from dataclasses import replace
from pathlib import Path

from toys import LetterTask

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.diagnosis.measurements import (
    AnswerFacts,
    Continuation,
    Diagnosis,
    Estimate,
    Gradients,
    LossGradient,
    RenderedPrompt,
)
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.interfaces import Problem, Sampling, Task
from opd_lightning.objectives import DivergenceObjective


class QuestionsOnly(Task):
    """A task that marks nothing."""

    def problems(self, split):
        return [Problem(f"q{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(4)]


def make_pair(student, teacher, **options):
    settings = {
        "student": HFStudent(str(student)),
        "teacher": HFTeacher(str(teacher), dtype="float32") if isinstance(teacher, Path) else teacher,
        "objective": DivergenceObjective(),
        "task": LetterTask(),
        "engine": HFEngine(),
        "teacher_engine": HFEngine(),
        "sampling": Sampling(max_new_tokens=4),
        "seed": 0,
        "max_tokens": 512,
    }
    return Pair(**(settings | options))


def gain(depth, value, error, accuracy=0.5):
    return Continuation(depth, 100, accuracy, accuracy + value, Estimate(value, error, 64))


def answers(mixed=0.5, truncated=0.0, accuracy=0.5):
    return AnswerFacts(Estimate(accuracy, 0.02, 64), mixed, 30.0, truncated, 0.0)


def loss(name, k=None, cosine=1.0, variance=1.0, norm=1.0):
    return LossGradient(name, k, norm, 0.5, 0.2, cosine, variance, 0.0)


def make_diagnosis(**options):
    """A pair that should be distilled, unless told otherwise."""
    facts = {"overlap_ratio": 0.75, "overlap_mass_teacher": 0.98, "student_entropy": 0.3, "reverse_kl": 0.2}
    settings = {
        "settings": {"seed": 0},
        "num_prompts": 64,
        "num_rollouts": 256,
        "num_tokens": 8000,
        "vocab_size": 150_000,
        "k": 16,
        "facts": facts,
        "student": answers(),
        "teacher": answers(accuracy=0.7),
        "teacher_own_template": None,
        "reward_auroc": 0.75,
        "num_right": 128,
        "positions": (),
        "continuations": (gain(0, 0.2, 0.02), gain(16, 0.1, 0.02)),
        "gradients": Gradients(32, 1000, 1000, (loss("the run's own"), loss("full vocabulary"))),
        "prompt": RenderedPrompt("u", "<user>1+1", "<user>1+1", 0),
        "findings": ("Both speak the same 150000 token ids.",),
        "left_out": (),
    }
    changed_facts = {name: options.pop(name) for name in list(options) if name in facts}
    diagnosis = Diagnosis(**(settings | options))
    return replace(diagnosis, facts={**facts, **changed_facts})
