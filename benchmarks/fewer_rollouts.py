"""How many rounds of generation, rollouts and seconds bring a student to its teacher, with rollouts used several times?

Every run starts from a sandbox's shipped student and ends when its held-out answers reach the bar, or after
`max_updates`. What is compared stands in fewer_rollouts_arms.py. Seconds are processor seconds of one thread, those of
generation apart, so that a step in which generation takes another share can be computed. Held-out evaluation is outside
the clocks and never touches the run. One line per run is appended to the results; runs already there are skipped.

Hardware: one x86-64 core and 2 GB. A run takes 10 seconds (near bar) to minutes (far bar, long sandbox).
Command:  python benchmarks/fewer_rollouts.py [GROUP ...]    (no group: all, in order of importance)
"""

import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from fewer_rollouts_arms import GROUPS, PROBLEMS, Arm
from lightning.pytorch import Callback, Trainer, seed_everything

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.callbacks.effopd_scores import divergence_from_teacher
from opd_lightning.extrapolation import undisturbed
from opd_lightning.interfaces import Sampling
from opd_lightning.rollouts.answering import answer, render_prompts
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

RESULTS = Path(__file__).parent / "results" / "fewer_rollouts_cpu-2core.jsonl"


class ClockedEngine(HFEngine):
    """Counts the processor seconds and the tokens of all that is generated."""

    seconds = 0.0
    tokens = 0

    def generate(self, *args: Any, **options: Any) -> Any:
        """As the engine's own."""
        started = time.process_time()
        rollouts = super().generate(*args, **options)
        self.seconds += time.process_time() - started
        self.tokens += sum(len(rollout.response_ids) for rollout in rollouts)
        return rollouts


@dataclass
class Trajectory(Callback):
    """Stops the clock, evaluates held-out problems, and ends the run at the bar. Comes after EffOPD."""

    arm: Arm
    engine: ClockedEngine
    points: list[dict[str, float]] = field(default_factory=list)
    rounds: int = 0
    rollouts: int = 0
    seconds: float = 0.0
    since_evaluation: int = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Answer the held-out problems once before the first step, then start the clock."""
        self.engine.seconds, self.engine.tokens = 0.0, 0
        self.evaluate(trainer, pl_module)
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Account for the step and its search; evaluate at the end of rounds, and now and then within long ones."""
        self.seconds += time.process_time() - self.started
        if batch.staleness == 0:
            self.rounds += 1
            self.rollouts += len(batch.round.rollouts) if batch.round is not None else len(batch.rollouts)
        self.since_evaluation += 1
        ends_round = outputs["ends_round"] and trainer.global_step % self.arm.evaluate_every == 0
        if ends_round or self.since_evaluation >= 16 or trainer.global_step >= self.arm.max_updates:
            self.evaluate(trainer, pl_module)
            self.since_evaluation = 0
            problem, point = PROBLEMS[self.arm.target], self.points[-1]
            trainer.should_stop = point["kl"] <= problem.kl and point["accuracy"] >= problem.accuracy
        self.started = time.process_time()

    def evaluate(self, trainer: Trainer, module: Any) -> None:
        """Add a point: what has been spent, reverse KL per token and sampled accuracy on the held-out problems."""
        spent = {
            "updates": trainer.global_step,
            "rounds": self.rounds,
            "rollouts": self.rollouts,
            "tokens": self.engine.tokens,
            "seconds": round(self.seconds, 3),
            "generation_seconds": round(self.engine.seconds, 3),
        }
        kept = self.engine.seconds, self.engine.tokens
        spent |= measure(trainer, module, PROBLEMS[self.arm.target].num_held_out)
        self.engine.seconds, self.engine.tokens = kept
        self.points.append(spent)


def measure(trainer: Any, module: OPDModule, num_held_out: int) -> dict[str, float]:
    """Reverse KL to the teacher per token, and sampled accuracy, on the held-out problems."""
    data = trainer.datamodule
    problems = data.task.problems("validation")[:num_held_out]
    prompts = render_prompts(
        module.spec.tokenizer, problems, range(len(problems)), num_samples=1, seed_parts=("held out",)
    )
    with undisturbed(module, seed=0):
        data.engine.sync(module.student, module.weight_version)
        rollouts = answer(data.engine, data.task, prompts, data.sampling, num_samples=1).rollouts
        total, count = divergence_from_teacher(module, rollouts)
    accuracy = sum(rollout.reward for rollout in rollouts) / len(rollouts)
    return {"kl": round(total / count, 5), "accuracy": round(accuracy, 5)}


def run(arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, which decides prompts, samples and orders."""
    seed_everything(seed, verbose=False)
    problem, engine = PROBLEMS[arm.target], ClockedEngine(max_batch_size=512)
    trajectory = Trajectory(arm, engine)
    searches = arm.make_callbacks()
    module = OPDModule(
        HFStudent(problem.student),
        HFTeacher(problem.teacher, dtype="float32"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arm.lr, weight_decay=0.0),
        top_k_metrics=1,  # the distance that ends rounds is among the facts
    )
    data = OPDDataModule(
        problem.make_task(),
        engine=engine,
        source=arm.make_source(),
        sampling=Sampling(max_new_tokens=problem.max_new_tokens),
        prompts_per_step=arm.rollouts // arm.mini_batches,
        num_reserved=50,
        seed=seed,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arm.max_updates,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[*searches, trajectory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if trainer.received_sigterm:
        raise SystemExit("stopped in the middle of a run, which is not recorded")
    bar = {"kl": problem.kl, "accuracy": problem.accuracy}
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "bar": bar}
    return {"arm": arm.name, "seed": seed, "settings": asdict(arm) | facts, "trajectory": trajectory.points}


def main(groups: list[str]) -> None:
    """Run what is missing, seed by seed within a group, and append a line per run."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for group in groups or list(GROUPS):
        seeds, arms = GROUPS[group]
        for seed in seeds:
            for arm in arms:
                lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
                if (arm.name, seed) in {(entry["arm"], entry["seed"]) for entry in map(json.loads, lines)}:
                    continue
                result = run(arm, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(time.strftime("%H:%M:%S"), group, arm.name, f"seed={seed}", result["trajectory"][-1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
