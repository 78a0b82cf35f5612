"""What the benchmarks that train a sandbox student share: clocks, held-out evaluation, one run, what is missing.

Hardware: any.
Command:  none; imported by effopd_speedup.py, found_rate.py, fewer_rollouts.py and long_sandbox.py
"""

import json
import logging
import os
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from opd_lightning.callbacks.effopd_scores import divergence_from_teacher
from opd_lightning.extrapolation import undisturbed
from opd_lightning.rollouts.answering import answer, render_prompts
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = Path(__file__).parent / "results"


class Trajectory(Callback):
    """Stops the clocks around everything but the training, evaluates held-out problems, and ends the run at its bar.

    Comes after callbacks that belong to the training, which the clocks count. Evaluation never touches the run: fixed
    problems, fixed sampling seeds, own random state.

    Args:
        average: Decay, per step, of an average of the weights that is evaluated too; 0 keeps none.
        num_held_out: Held-out problems.
    """

    def __init__(self, num_held_out: int, average: float = 0.0) -> None:
        self.num_held_out = num_held_out
        self.average_decay = average
        self.points: list[dict[str, Any]] = []
        self.seconds = self.wall_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Answer the held-out problems once before the first step, then start the clocks."""
        self.average = [weight.detach().clone() for weight in pl_module.student.parameters()]
        self.begin(trainer)
        self.add_point(trainer, pl_module)
        self.start_clocks()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Account for the step and its search; evaluate where that is wanted."""
        if self.average_decay:
            weights = [weight.detach() for weight in pl_module.student.parameters()]
            torch._foreach_lerp_(self.average, weights, 1 - self.average_decay)
        self.seconds += time.process_time() - self.started[0]
        self.wall_seconds += time.perf_counter() - self.started[1]
        if self.account(trainer, pl_module, outputs, batch):
            self.add_point(trainer, pl_module)
            trainer.should_stop = self.is_over(self.points)
        self.start_clocks()

    def start_clocks(self) -> None:
        self.started = (time.process_time(), time.perf_counter())

    def begin(self, trainer: Trainer) -> None:
        """Set up counters."""

    @abstractmethod
    def account(self, trainer: Trainer, module: Any, outputs: Any, batch: Any) -> bool:
        """Count what the step has spent; whether to evaluate now."""

    @abstractmethod
    def spent(self, trainer: Trainer) -> dict[str, Any]:
        """What has been spent so far."""

    @abstractmethod
    def is_over(self, points: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the run ends at the last of these points."""

    def add_point(self, trainer: Trainer, module: Any) -> None:
        """What has been spent, and the readings of the held-out problems."""
        self.points.append(self.spent(trainer) | self.readings(trainer, module, self.num_held_out))

    def readings(self, trainer: Trainer, module: Any, num_held_out: int) -> dict[str, float]:
        """What `measure` says of the weights, and of their average if there is one."""
        found = measure(trainer, module, num_held_out)
        if self.average_decay:
            weights = [weight.data for weight in module.student.parameters()]
            current = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, self.average)
            averaged = measure(trainer, module, num_held_out)
            torch._foreach_copy_(weights, current)
            found |= {f"averaged_{name}": value for name, value in averaged.items()}
        return found


def measure(trainer: Any, module: OPDModule, num_held_out: int) -> dict[str, float]:
    """Reverse KL to the true teacher per token, sampled accuracy and response length, on the held-out problems."""
    data = trainer.datamodule
    problems = data.task.problems("validation")[:num_held_out]
    prompts = render_prompts(
        module.spec.tokenizer, problems, range(len(problems)), num_samples=1, seed_parts=("held out",)
    )
    with undisturbed(module, seed=0):
        data.source.wait()  # one that generates ahead is using the engine
        data.engine.sync(module.student, module.weight_version)
        rollouts = answer(data.engine, data.task, prompts, data.sampling, num_samples=1).rollouts
        distilled_from = module.teacher
        module.teacher = getattr(distilled_from, "teacher", distilled_from)
        total, count = divergence_from_teacher(module, rollouts)
        module.teacher = distilled_from
    return {
        "kl": round(total / count, 5),
        "accuracy": round(sum(rollout.reward for rollout in rollouts) / len(rollouts), 5),
        "length": round(count / len(rollouts), 1),
    }


def fit(module: OPDModule, data: OPDDataModule, callbacks: list[Callback], max_steps: int) -> None:
    """Train, with nothing around that costs time or says anything."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if trainer.received_sigterm:
        raise SystemExit("stopped in the middle of a run, which is not recorded")


def facts() -> dict[str, Any]:
    """What a run was made with."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def read_runs(path: Path) -> list[dict[str, Any]]:
    """All runs recorded in a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(
    groups: Mapping[str, tuple[Iterable[int], Sequence[Any]]],
    chosen: Sequence[str],
    run: Callable[[Any, int], dict[str, Any]],
    path_of: Callable[[Any], Path],
) -> None:
    """Run what no file has yet, seed by seed within a group, and append a line per run.

    Args:
        groups: Seeds and arms by name, the most important first.
        chosen: Names of groups; empty takes all.
        run: Makes the record of an arm and a seed.
        path_of: The file of an arm's records.
    """
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for group in chosen or list(groups):
        seeds, arms = groups[group]
        for seed in seeds:
            for arm in arms:
                path = path_of(arm)
                if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in read_runs(path)}:
                    continue
                result = {"arm": arm.name, "seed": seed, "group": group} | run(arm, seed)
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(time.strftime("%H:%M:%S"), group, arm.name, f"seed={seed}", result["trajectory"][-1], flush=True)
