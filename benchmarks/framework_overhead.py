"""Share of a quickstart step that is neither generation, teacher, student forward/backward nor optimiser.

In processor seconds, because the machine may be busy with other things. The token metrics are computed in the same pass
as the loss and so count as student time; what they cost is the difference to runs without them, in turn.

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
from opd_lightning.tasks import ArithmeticTask
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = Path(__file__).parent / "results"
WORK = ("generate", "teacher", "student", "optimizer")
NUM_REPEATS = 3


class Clock(Callback):
    """Processor seconds of each step, and what the step says of its parts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.last = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        now = time.process_time()
        parts = batch.seconds | pl_module.stopwatch.seconds  # where the logged ones come from: asking for those costs
        self.steps.append({"total": now - self.last} | {part: parts[part] for part in WORK})
        self.last = now


def run(num_steps: int, top_k_metrics: int = 16) -> list[dict[str, float]]:
    """The quickstart's training without validation; the first two steps are warm-up."""
    time.perf_counter = time.process_time  # what the run's own stopwatch reads
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
            max_tokens_per_micro_batch=512,
            top_k_metrics=top_k_metrics,
        )
        trainer.fit(module, OPDDataModule(ArithmeticTask(), sampling=Sampling(max_new_tokens=72)))
    return clock.steps[2:]


def main(num_steps: int = 14) -> None:
    """Write the raw steps and print medians."""
    torch.set_num_threads(1)
    pairs = [(run(num_steps), run(num_steps, 0)) for _ in range(NUM_REPEATS)]
    steps = [step for with_metrics, _ in pairs for step in with_metrics]
    bare = [step for _, without in pairs for step in without]
    metrics = [(one["student"] - other["student"]) / one["total"] for one, other in zip(steps, bare, strict=True)]
    summary = {
        "median_overhead_share": statistics.median(
            (step["total"] - sum(step[part] for part in WORK)) / step["total"] for step in steps
        ),
        "median_metrics_share": statistics.median(metrics),
        "median_step_seconds": statistics.median(step["total"] for step in steps),
    }
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "summary": summary, "runs": pairs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "framework_overhead_cpu-2core.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
