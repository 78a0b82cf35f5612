"""Do the phenomena of "Rethinking On-Policy Distillation" (arXiv 2604.13016) show in models of 600,000 weights?

Makes the zoo (`runs/zoo`, or $ZOO), runs what is missing of phenomenology_arms.py, appends one line per run to the
results, writes the tables into docs/phenomenology.md and the pictures beside it. Every run has 32 rollouts a step and
is measured on 128 held-out problems, one sampled answer each, with fixed sampling seeds and outside the clock.

Hardware: one x86-64 core and 1 GB; 5 to 20 processor seconds a run, 20 minutes in all.
Command:  python benchmarks/phenomenology.py [PHENOMENON ...]    (no name: all; `tables` alone runs nothing)
"""

import itertools
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from phenomenology_arms import OBJECTIVES, PHENOMENA, SEEDS, Arm
from phenomenology_report import write_report
from sandbox_runs import fit
from transformers import AutoModelForCausalLM

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.extrapolation import undisturbed
from opd_lightning.interfaces import LiveStudent, Problem, RolloutBatch, Sampling, Split, StepPrompts
from opd_lightning.objectives import NLL
from opd_lightning.rollouts.answering import answer, render_prompts
from opd_lightning.rollouts.horizon import ConstantHorizon
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.sandbox import resolve
from opd_lightning.sandbox.make_zoo import make
from opd_lightning.sandbox.notations import NotationTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = Path(__file__).parent / "results" / "phenomenology_cpu-2core.jsonl"
ZOO = Path(os.environ.get("ZOO", "runs/zoo"))
SAMPLING = Sampling(max_new_tokens=64)
PROMPTS_PER_STEP = 32
NUM_HELD_OUT = 128
NUM_PROMPTS = 4096  # for distillation; the cold start has as many others
SHIPPED = ("student", "teacher")
KEPT = (
    "accuracy",
    "loss",
    "grad_norm",
    "reverse_kl",
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_advantage",
    "student_entropy",
    "teacher_entropy",
    "truncation_rate",
)


class OtherPrompts(NotationTask):
    """The same task with the training problems that distillation does not use."""

    def problems(self, split: Split) -> list[Problem]:
        problems = super().problems(split)
        return problems[NUM_PROMPTS:] if split == "train" else problems


class TeacherWritten(OnPolicy):
    """Answers come from another model, which is never trained.

    Args:
        folder: Of that model.
    """

    staleness = 1  # they are not the student's

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        self.engine.sync(self.model, -2)
        rollouts = self.engine.generate(step.prompts, sampling)
        return RolloutBatch(rollouts, 0, step.step, sampling, {}, staleness=max(step.step, 1))


class Recorder(Callback):
    """Keeps the metrics of every step, measures held-out problems before and after, and stops the clock meanwhile.

    Args:
        num_steps: After which the run ends.
        teacher_accuracy: If it is known from another run; None measures it.
        before: What was measured before the first step, if it is known from another run; None measures it.
    """

    def __init__(
        self, num_steps: int, teacher_accuracy: float | None = None, before: dict[str, float] | None = None
    ) -> None:
        self.evaluate_at = (num_steps,) if before else (0, num_steps)
        self.evaluations: list[dict[str, float]] = [before] if before else []
        self.teacher_accuracy = teacher_accuracy
        self.steps: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.teacher is not None and self.teacher_accuracy is None:
            teacher = pl_module.teacher.as_student()[1]
            self.teacher_accuracy = held_out(trainer, pl_module, teacher, "plain")["accuracy"]
        self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seconds += time.process_time() - self.started
        metrics = trainer.callback_metrics
        self.steps.append({k: round(float(metrics[f"train/{k}"]), 5) for k in KEPT if f"train/{k}" in metrics})
        self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Any, module: Any) -> None:
        """Add a point where one is due, and start the clock."""
        if trainer.global_step in self.evaluate_at:
            point = {"step": trainer.global_step} | held_out(trainer, module, module.model, "plain")
            if (template := trainer.datamodule.task.template) != "plain":
                other = held_out(trainer, module, module.model, template)
                point |= {f"{name}_{template}": value for name, value in other.items()}
            self.evaluations.append(point)
        self.started = time.process_time()


def held_out(trainer: Any, module: OPDModule, model: Any, template: Any) -> dict[str, float]:
    """Accuracy, length and truncation of a model's sampled answers to the held-out problems of the run's levels."""
    data = trainer.datamodule
    task = NotationTask(template, num_train=0, num_validation=NUM_HELD_OUT, levels=data.task.levels)
    problems = task.problems("validation")
    tokenizer = module.spec.tokenizer
    prompts = render_prompts(tokenizer, problems, range(NUM_HELD_OUT), num_samples=1, seed_parts=("held out",))
    with undisturbed(module, seed=0):
        data.engine.sync(model, module.weight_version)
        rollouts = answer(data.engine, task, prompts, SAMPLING, num_samples=1).rollouts
    return {
        "accuracy": round(sum(rollout.reward for rollout in rollouts) / NUM_HELD_OUT, 5),
        "length": round(sum(len(rollout.response_ids) for rollout in rollouts) / NUM_HELD_OUT, 3),
        "truncated": round(sum(not rollout.finished for rollout in rollouts) / NUM_HELD_OUT, 5),
    }


def model_path(name: str) -> str:
    """Where a model of an arm lies."""
    return resolve(f"sandbox:{name}") if name in SHIPPED else str(ZOO / name)


def imitate(arm: Arm, seed: int, folder: Path, before: dict[str, float] | None = None) -> Recorder:
    """The cold start: the student learns the teacher's answers to other prompts and is written to the folder."""
    module = OPDModule(HFStudent(model_path(arm.student)), None, NLL(), optimizer=adamw(arm), top_k_metrics=0)
    data = OPDDataModule(
        OtherPrompts(arm.template, num_train=2 * NUM_PROMPTS, levels=arm.levels),
        source=TeacherWritten(model_path(arm.teacher)),
        sampling=SAMPLING,
        prompts_per_step=PROMPTS_PER_STEP,
        seed=seed,
    )
    recorder = Recorder(arm.cold_start, before=before)
    fit(module, data, [recorder], arm.cold_start)
    module.spec.save(module.model, folder)
    return recorder


def adamw(arm: Arm) -> Any:
    """The optimiser of both stages."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=arm.learning_rate, weight_decay=0.0)


def run(arm: Arm, seed: int, known: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Run one arm with one seed, which decides prompts and samples; what known runs have measured counts."""
    before = next((r["evaluations"][0] for r in known if is_like(r, arm, "student", "levels", "template")), None)
    teachers = (r["teacher_accuracy"] for r in known if is_like(r, arm, "teacher", "levels"))
    seed_everything(seed, verbose=False)
    result: dict[str, Any] = {"arm": arm.name, "seed": seed, "settings": asdict(arm) | {"torch": torch.__version__}}
    with tempfile.TemporaryDirectory() as folder:
        start = model_path(arm.student)
        if arm.cold_start:
            imitated, before = imitate(arm, seed, Path(folder) / "student", before), None
            start = str(Path(folder) / "student")
            result["imitation"] = {"evaluations": imitated.evaluations, "seconds": round(imitated.seconds, 2)}
        module = OPDModule(
            HFStudent(start),
            HFTeacher(model_path(arm.teacher), dtype="float32"),
            OBJECTIVES[arm.objective](),
            optimizer=adamw(arm),
        )
        data = OPDDataModule(
            NotationTask(arm.template, num_train=NUM_PROMPTS, levels=arm.levels),
            sampling=SAMPLING,
            horizon=ConstantHorizon(arm.horizon) if arm.horizon else None,
            prompts_per_step=PROMPTS_PER_STEP,
            seed=seed,
        )
        recorder = Recorder(arm.num_steps, next(teachers, None), before)
        fit(module, data, [recorder], arm.num_steps)
    return result | {
        "teacher_accuracy": recorder.teacher_accuracy,
        "evaluations": recorder.evaluations,
        "steps": recorder.steps,
        "seconds": round(recorder.seconds, 2),
    }


def is_like(result: dict[str, Any], arm: Arm, *settings: str) -> bool:
    """Whether a run began with the student as it is, and shares these settings."""
    other = result["settings"] | {"levels": tuple(result["settings"]["levels"])}
    return not other["cold_start"] and all(other[name] == getattr(arm, name) for name in settings)


def read_results() -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main(names: list[str]) -> None:
    """Run what is missing and write tables and pictures."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    for name in [name for name in names or PHENOMENA if name != "tables"]:
        for seed, arm in itertools.product(SEEDS, PHENOMENA[name].values()):
            known = read_results()
            if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in known}:
                continue
            make(ZOO, names=sorted({arm.student, arm.teacher} - set(SHIPPED)))
            result = run(arm, seed, known)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            last = result["evaluations"][-1]
            print(time.strftime("%H:%M:%S"), arm.name, f"seed={seed}", last, result["seconds"], flush=True)
    write_report(read_results())


if __name__ == "__main__":
    main(sys.argv[1:])
