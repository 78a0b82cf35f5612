"""Share of a quickstart step that is neither generation, teacher, student forward/backward nor optimiser.

The token metrics are computed between forward and backward and so count as student time in the run's own log; here they
are timed by themselves and counted as overhead.

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
from opd_lightning.interfaces import Sampling
from opd_lightning.objectives import chunks
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = Path(__file__).parent / "results"
WORK = ("generate", "teacher", "student", "optimizer")
NUM_REPEATS = 3


class Clock(Callback):
    """Wall-clock seconds of each step, and what the step says of its parts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = self.metrics = 0.0
        self.token_facts = chunks.token_facts

    def time_metrics(self, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.token_facts(*args)
        finally:
            self.metrics += time.perf_counter() - started

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        now = time.perf_counter()
        seconds = pl_module.stopwatch.seconds
        parts = {part: float(trainer.callback_metrics[f"train/seconds/{part}"]) for part in WORK}
        assert set(seconds) <= set(WORK)
        self.steps.append({"total": now - self.last, "metrics": self.metrics, **parts})
        self.last, self.metrics = now, 0.0


def run(num_steps: int) -> list[dict[str, float]]:
    """The quickstart's training without validation; the first two steps are warm-up."""
    seed_everything(0, verbose=False)
    clock = Clock()
    chunks.token_facts = clock.time_metrics
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
        )
        trainer.fit(module, OPDDataModule(ArithmeticTask(), sampling=Sampling(max_new_tokens=72)))
    chunks.token_facts = clock.token_facts
    return clock.steps[2:]


def main(num_steps: int = 14) -> None:
    """Write the raw steps and print medians."""
    runs = [run(num_steps) for _ in range(NUM_REPEATS)]
    steps = [step for steps in runs for step in steps]
    rest = [step["total"] - sum(step[part] for part in WORK) for step in steps]
    summary = {
        "median_overhead_share": statistics.median(
            (other + step["metrics"]) / step["total"] for other, step in zip(rest, steps, strict=True)
        ),
        "median_metrics_share": statistics.median(step["metrics"] / step["total"] for step in steps),
        "median_step_seconds": statistics.median(step["total"] for step in steps),
    }
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "summary": summary, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "framework_overhead_cpu-2core.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
