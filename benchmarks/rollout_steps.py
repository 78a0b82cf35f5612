"""The section of `rollout_throughput.py` that trains: where the time of whole steps goes.

Training has one core; servers, where there are any, share the other.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rollout_workloads import (
    ENGINE_ARGS,
    OWN_CORE,
    SERVER_CORE,
    SIZES,
    ZERO,
    CountingTask,
    ServerProcess,
    make_counter,
)

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.backends.vllm.server import Connection, VLLMServerEngine, VLLMServerTeacher
from opd_lightning.interfaces import RolloutEngine, RolloutSource, Sampling, Teacher
from opd_lightning.objectives import DivergenceObjective, TeacherTopK
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.sandbox import resolve
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

PARTS = ("sync", "generate", "grade", "teacher", "student", "optimizer")
NUM_WARM_UP = 2


class Clock(Callback):
    """Wall-clock seconds of each step and of its parts, from the run's own log."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The first step begins."""
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """One step is over."""
        now = time.perf_counter()
        parts = {part: float(trainer.callback_metrics[f"train/seconds/{part}"]) for part in PARTS}
        self.steps.append({"total": now - self.last, **parts})
        self.last = now


@dataclass(frozen=True)
class Case:
    """One kind of step: who learns from whom on what."""

    student: str
    make_data: Callable[[RolloutEngine], OPDDataModule]
    make_engine: Callable[[], RolloutEngine]
    make_teacher: Callable[[], Teacher]
    num_steps: int
    most_repeats: int


def measure_steps(folder: Path, repeats: int) -> dict:
    """Whole training steps of 64 rollouts for each pair of engine and teacher, in turn."""
    os.sched_setaffinity(0, OWN_CORE)
    sandbox = resolve("sandbox:student"), resolve("sandbox:teacher")
    counting = tuple(str(make_counter(folder / name, SIZES["10M"], seed)) for seed, name in enumerate("st"))
    cases: dict[str, Case] = {}
    with ExitStack() as stack:
        for size, (student, teacher) in {"sandbox": sandbox, "10M": counting}.items():
            make_data = sandbox_data if size == "sandbox" else counting_data
            urls = [
                stack.enter_context(ServerProcess(Path(model), folder / f"{size}{i}", SERVER_CORE, 512)).url
                for i, model in enumerate((student, teacher))
            ]
            pairs: dict[str, tuple[Callable[[], RolloutEngine], Callable[[], Teacher]]] = {
                "hf, hf": (HFEngine, partial(HFTeacher, teacher, dtype="float32")),
                "vllm, hf": (partial(VLLMColocatedEngine, ENGINE_ARGS), partial(HFTeacher, teacher, dtype="float32")),
                "servers": (
                    partial(VLLMServerEngine, Connection(urls[:1])),
                    partial(VLLMServerTeacher, Connection(urls[1:]), max_top_k=16),
                ),
            }
            often = (NUM_WARM_UP + 6, repeats - 2) if size == "sandbox" else (NUM_WARM_UP + 3, 1)
            for name, (make_engine, make_teacher) in pairs.items():
                cases[f"{size}: {name}"] = Case(student, make_data, make_engine, make_teacher, *often)
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for repeat in range(repeats):
            for name, case in cases.items():
                if repeat < case.most_repeats:
                    steps[name] += fit(case, folder)
    return {name: summarize_steps(name, measured) for name, measured in steps.items()}


def measure_ahead(folder: Path, repeats: int) -> dict:
    """The steps of the larger model with servers, with and without generating one step ahead, in turn."""
    os.sched_setaffinity(0, OWN_CORE)
    student, teacher = (str(make_counter(folder / name, SIZES["10M"], seed)) for seed, name in enumerate("st"))
    with ExitStack() as stack:
        urls = [
            stack.enter_context(ServerProcess(Path(model), folder / f"server{i}", SERVER_CORE, 512)).url
            for i, model in enumerate((student, teacher))
        ]
        make_engine = partial(VLLMServerEngine, Connection(urls[:1]))
        make_teacher = partial(VLLMServerTeacher, Connection(urls[1:]), max_top_k=16)
        cases = {
            name: Case(student, partial(counting_data, source=source), make_engine, make_teacher, 5, repeats)
            for name, source in (("on-policy", OnPolicy), ("one step ahead", OneStepAhead))
        }
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, case in cases.items():
                steps[name] += fit(case, folder)
    summary = {name: summarize_steps(name, measured) for name, measured in steps.items()}
    totals = [summary[name]["median_seconds"]["total"] for name in cases]
    print(f"one step ahead: {totals[0] / totals[1]:.2f}x", flush=True)
    return summary | {"speedup_of_medians": totals[0] / totals[1]}


def sandbox_data(engine: RolloutEngine) -> OPDDataModule:
    """As in the quickstart."""
    return OPDDataModule(ArithmeticTask(), engine, sampling=Sampling(max_new_tokens=72))


def counting_data(engine: RolloutEngine, *, source: Callable[[], RolloutSource] = OnPolicy) -> OPDDataModule:
    """The same number of longer rollouts."""
    sampling = Sampling(max_new_tokens=256, stop_ids=[ZERO])
    return OPDDataModule(CountingTask(), engine, source(), sampling=sampling)


def fit(case: Case, folder: Path) -> list[dict[str, float]]:
    """The steps of one run, without the first ones."""
    seed_everything(0, verbose=False)
    clock, teacher = Clock(), case.make_teacher()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=case.num_steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[clock],
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    is_listed = isinstance(teacher, VLLMServerTeacher)
    module = OPDModule(
        HFStudent(case.student),
        teacher,
        DivergenceObjective(TeacherTopK(16)) if is_listed else DivergenceObjective(),
        # far too small to change what the next rollouts look like; the work is the same
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        max_tokens_per_micro_batch=2048,
    )
    trainer.fit(module, case.make_data(case.make_engine()))
    return clock.steps[NUM_WARM_UP:]


def summarize_steps(name: str, steps: list[dict[str, float]]) -> dict:
    """Median seconds of a step and of its parts, and their shares of it."""
    columns = {part: [step[part] for step in steps] for part in ("total", *PARTS)}
    shares = {
        part: statistics.median(p / t for p, t in zip(columns[part], columns["total"], strict=True)) for part in PARTS
    }
    line = ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items())
    print(f"{name}: {statistics.median(columns['total']):.2f} s a step; {line}", flush=True)
    return {
        "steps": steps,
        "median_seconds": {part: statistics.median(values) for part, values in columns.items()},
        "median_shares": shares,
    }
