"""Share of a quickstart step that is neither generation, teacher, student forward/backward nor optimiser.

The token metrics are computed between forward and backward and so count as student time in the run's own log; here they
are switched off in every other run, and the difference is reported beside the overhead.

Command: python benchmarks/framework_overhead.py [NUM_STEPS]
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.datamodule import OPDDataModule
from opd_lightning.interfaces import Sampling
from opd_lightning.module import OPDModule
from opd_lightning.tasks import ArithmeticTask

RESULTS = Path(__file__).parent / "results"
WORK = ("generate", "teacher", "student", "optimizer")
NUM_REPEATS = 3


class Clock(Callback):
    """Wall-clock seconds of each step, and what the step says of its parts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        now = time.perf_counter()
        seconds = pl_module.stopwatch.seconds
        parts = {part: float(trainer.callback_metrics[f"train/seconds/{part}"]) for part in WORK}
        assert set(seconds) <= set(WORK)
        self.steps.append({"total": now - self.last, **parts})
        self.last = now


def run(num_steps: int, top_k_metrics: int) -> list[dict[str, float]]:
    """The quickstart's training without validation; the first two steps are warm-up."""
    seed_everything(0, verbose=False)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=num_steps,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[clock],
            default_root_dir=folder,
            log_every_n_steps=1,
            enable_model_summary=False,
        )
        module = OPDModule(
            HFStudent("sandbox:student"),
            HFTeacher("sandbox:teacher", dtype="float32"),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
            top_k_metrics=top_k_metrics,
        )
        trainer.fit(module, OPDDataModule(ArithmeticTask(), sampling=Sampling(max_new_tokens=72)))
    return clock.steps[2:]


def main(num_steps: int = 14) -> None:
    """Alternate runs with and without metrics; write the raw steps and print medians."""
    runs = [{"top_k_metrics": k, "steps": run(num_steps, k)} for _ in range(NUM_REPEATS) for k in (16, 0)]
    summary = {}
    for k in (16, 0):
        steps = [step for entry in runs if entry["top_k_metrics"] == k for step in entry["steps"]]
        overheads = [1 - sum(step[part] for part in WORK) / step["total"] for step in steps]
        summary[str(k)] = {
            "median_overhead_share": statistics.median(overheads),
            "median_step_seconds": statistics.median(step["total"] for step in steps),
            "median_student_seconds": statistics.median(step["student"] for step in steps),
        }
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "summary": summary, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "framework_overhead_cpu-2core.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
