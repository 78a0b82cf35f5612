"""Which published method brings a sandbox's student nearer its teacher than plain distillation, at equal cost?

Contestants are the files of configs/methods as they are, on top of the sandbox's own configuration: plain distillation
with nothing on top, the plain sampled-token estimator, and a control that ignores the teacher. Every one of them gets
the same rollouts per step, the same optimiser (AdamW at a constant rate) and the same three rates to be tuned with, one
run each of the rollouts alone; the best of the three, by held-out divergence, is run with fresh seeds. Such a run goes
on until it has had its rollouts and its processor seconds, whichever comes later, and is measured on the way: reverse
KL to the sandbox's teacher and sampled accuracy on held-out problems, outside the clock. Rollouts are those trained on;
what is generated for them is recorded too (every turn with a tool counts there). What a method reads from files is
written before, once, and costs it nothing here. One line per run is appended to the results; runs already there are
skipped.

Hardware: one x86-64 core and 2 GB. A run takes some 10 (short) to 40 processor seconds (long).
Command:  python benchmarks/methods.py short|long tune|compare [NAME ...]    (no name: all)
"""

import io
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from fewer_rollouts import ClockedEngine
from lightning.pytorch import Trainer, seed_everything
from sandbox_runs import RESULTS as FOLDER
from sandbox_runs import Trajectory, facts, fit, read_runs

from opd_lightning import Advantage
from opd_lightning.backends.hf import HFTeacher
from opd_lightning.commands.cli import OPDCLI
from opd_lightning.commands.cli import main as command
from opd_lightning.commands.shipped_configs import folder

RESULTS = FOLDER / "methods_cpu-2core.jsonl"
TUNING_SEED, SEEDS = 20, range(30, 35)
MOST = 4  # times its rollouts, that a cheap method may go on to use up its seconds


class Blind(Advantage):
    """-1 for every token, whatever the teacher says."""

    def __call__(self, rewards: torch.Tensor, *_: Any) -> torch.Tensor:
        """Of the same shape."""
        return -torch.ones_like(rewards)


SAMPLED = ["--model.objective", "SampledTokenObjective"]
CONTROLS: dict[str, list[str]] = {  # what the command says in place of a method's configuration
    "plain": [],
    "plain-sampled": SAMPLED,
    "control": [*SAMPLED, "--model.objective.advantage", "methods.Blind"],
}
NOT_RUN = {  # methods that need what no sandbox has, each with what it needs
    "ropd": "it needs a chat model that marks answers by questions",
}
ROLLOUT = ["rollout", "--num_problems", "512", "--seed_everything", "1", "--trainer.callbacks", "[]"]
BY_STUDENT = [*ROLLOUT, "--role", "student"]
BEFORE = {  # what is written for a method before its first run: the command, and the file
    "gkd": ([*ROLLOUT, "--output"], "runs/cold_start/answers.jsonl"),
    "lightning_opd": ([*BY_STUDENT, "--score", "true", "--reject.truncated", "false", "--output"], "scored.jsonl"),
    "brts": ([*ROLLOUT, "--num_samples", "4", "--output"], "runs/brts/candidates.jsonl"),
    "uni_opd_data": ([*BY_STUDENT, "--num_samples", "8", "--output"], "runs/uni_opd/passes.jsonl"),
}
WRITTEN = Path(tempfile.gettempdir(), "opd_lightning_methods")  # such files, by sandbox: every run reads the same


@dataclass(frozen=True)
class Sandbox:
    """Where contestants meet.

    Attributes:
        config: The configuration they go on top of.
        teacher: Whom all are measured against, whatever teaches them.
        rates: What everybody is tuned with; that of plain distillation lies in the middle.
        rollouts: What everybody gets.
        seconds: Processor seconds, likewise.
        every: Rollouts between two measurements.
        num_held_out: Problems.
        per_step: Rollouts of a step.
        prefix: Of the names of its models.
    """

    config: str
    teacher: str
    rates: tuple[float, ...]
    rollouts: int
    seconds: float
    every: int
    num_held_out: int
    per_step: int = 64
    prefix: str = ""


SANDBOXES = {
    "short": Sandbox("@quickstart", "sandbox:teacher", (3e-4, 5e-4, 1e-3), 512, 7.0, every=128, num_held_out=96),
    "long": Sandbox(
        "@long_sandbox", "sandbox:long-teacher", (1e-3, 2e-3, 3e-3), 512, 18.0, 128, num_held_out=64, prefix="long-"
    ),
}


class Progress(Trajectory):
    """What has been spent at each measurement, and what was reached."""

    def __init__(self, sandbox: Sandbox, engine: ClockedEngine) -> None:
        super().__init__(sandbox.num_held_out)
        self.sandbox, self.engine = sandbox, engine
        self.rollouts = self.measured = 0

    def begin(self, trainer: Trainer) -> None:
        self.engine.forget()
        self.judge = HFTeacher(self.sandbox.teacher, dtype="float32")
        module: Any = trainer.lightning_module
        self.judge.setup(module.spec, module.student, module.device)

    def account(self, trainer: Trainer, module: Any, outputs: Any, batch: Any) -> bool:
        """After every so many rollouts, and when the seconds are over."""
        self.rollouts += len(batch.rollouts)
        due = self.rollouts - self.measured >= self.sandbox.every or self.is_over([{"rollouts": self.rollouts}])
        if due:
            self.measured = self.rollouts
        return due

    def spent(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "updates": trainer.global_step,
            "rollouts": self.rollouts,
            "generated": self.engine.rollouts,
            "tokens": self.engine.tokens,
            "seconds": round(self.seconds, 3),
            "generation_seconds": round(self.engine.seconds, 3),
        }

    def is_over(self, points: Sequence[Mapping[str, Any]]) -> bool:
        rollouts, enough = points[-1]["rollouts"], self.sandbox.rollouts
        return bool(rollouts >= enough and (self.seconds >= self.sandbox.seconds or rollouts >= MOST * enough))

    def add_point(self, trainer: Trainer, module: Any) -> None:
        """Against the sandbox's teacher, and without counting what evaluation generates."""
        kept = vars(self.engine).copy()
        own, module.teacher = module.teacher, self.judge
        super().add_point(trainer, module)
        module.teacher = own
        vars(self.engine).update({name: kept[name] for name in ("seconds", "rounds", "rollouts", "tokens")})


class Built(OPDCLI):
    """The command up to the point at which it would run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def contestants() -> list[str]:
    """The controls, then every shipped method."""
    return [*CONTROLS, *sorted(path.stem for path in (folder() / "methods").glob("*.yaml"))]


def files_of(name: str, sandbox: Sandbox, root: Path) -> None:
    """Write what a method reads, where its configuration expects it."""
    if name in BEFORE:
        words, path = BEFORE[name]
        kept = WRITTEN / sandbox.config.strip("@") / name / Path(path).name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                command([words[0], "--config", sandbox.config, *words[1:], str(kept)])
        copytree(kept.parent, (root / path).parent, dirs_exist_ok=True)


def run(name: str, sandbox: Sandbox, lr: float, seed: int) -> dict[str, Any]:
    """Train one contestant; the seed decides prompts, samples and orders."""
    words = ["fit", "--config", sandbox.config, "--trainer.callbacks", "[]"]
    end = ["--seed_everything", str(seed), "--model.lr_scheduler", "null", "--model.optimizer.lr", str(lr)]
    with tempfile.TemporaryDirectory() as root, chdir(root):
        files_of(name, sandbox, Path(root))
        seed_everything(seed, verbose=False)
        if name in CONTROLS:
            words += CONTROLS[name]
        else:  # those that name the sandbox's models mean those of this one
            own = Path(root, "method.yaml")
            text = (folder() / "methods" / f"{name}.yaml").read_text()
            own.write_text(text.replace("sandbox:", f"sandbox:{sandbox.prefix}"))
            words += ["--config", str(own)]
        words += [*end, "--data.num_validation_problems", "null"]
        built = Built([*words, "--trainer.default_root_dir", root])
        module, data = built.model, built.datamodule
        data.engine = engine = ClockedEngine(is_behind=False)
        data.prompts_per_step = max(1, sandbox.per_step // data.rollouts_per_prompt)
        progress = Progress(sandbox, engine)
        callbacks = built.config_init.fit.trainer.callbacks or []
        fit(module, data, [*callbacks, progress], MOST * sandbox.rollouts)
    settings = {"lr": lr, "per_step": sandbox.per_step} | asdict(sandbox) | facts()
    return {"settings": settings, "trajectory": progress.points}


def best_rate(name: str, where: str) -> float:
    """The rate whose tuning run came nearest the teacher once it had had its rollouts.

    Raises:
        ValueError: Not every rate has been tried.
    """
    found = {}
    for record in read_runs(RESULTS):
        if (record["name"], record["sandbox"], record["seed"]) == (name, where, TUNING_SEED):
            found[record["settings"]["lr"]] = after_rollouts(record)["kl"]
    if set(found) != set(SANDBOXES[where].rates):
        raise ValueError(f"{name}: tune it first; tried {sorted(found)} of {SANDBOXES[where].rates}.")
    return min(found, key=found.__getitem__)


def after_rollouts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The first point at which a run had had its rollouts."""
    enough = record["settings"]["rollouts"]
    return next(point for point in record["trajectory"] if point["rollouts"] >= enough)


def cases_of(stage: str, where: str, names: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    """Contestants, rates and seeds of a stage: name by name to tune, seed by seed to compare."""
    if stage == "tune":
        yield from ((name, lr, TUNING_SEED) for name in names for lr in SANDBOXES[where].rates)
    else:
        yield from ((name, best_rate(name, where), seed) for seed in SEEDS for name in names)


def main(where: str, stage: str, *names: str) -> None:
    """Run what is missing and append it."""
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    sandbox = SANDBOXES[where]
    if stage == "tune":  # the rollouts alone, and one measurement behind them
        sandbox = replace(sandbox, seconds=0.0, every=sandbox.rollouts)
    for name, lr, seed in cases_of(stage, where, [name for name in names or contestants() if name not in NOT_RUN]):
        known = {(one["name"], one["sandbox"], one["settings"]["lr"], one["seed"]) for one in read_runs(RESULTS)}
        if (name, where, lr, seed) in known:
            continue
        record = {"name": name, "sandbox": where, "seed": seed} | run(name, sandbox, lr, seed)
        with Path(RESULTS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(time.strftime("%H:%M:%S"), name, lr, seed, record["trajectory"][-1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
