"""How many rounds of generation, rollouts and seconds bring a student to its teacher, with rollouts used several times?

Every run starts from a sandbox's shipped student and ends when its held-out answers reach the bar, or after
`max_updates`, or when it has taken as many processor seconds as its problem allows. What is compared stands in
fewer_rollouts_arms.py. Seconds are processor seconds of one thread, those of generation apart, so that a step in which
generation takes another share can be computed; a search's rollouts, tokens and seconds count as all others. Held-out
evaluation is outside the clocks and never touches the run. One line per run is appended to the results; runs already
there are skipped.

Hardware: one x86-64 core and 2 GB. A run takes 10 seconds (near bar) to minutes (far bar, long sandbox).
Command:  python benchmarks/fewer_rollouts.py [GROUP ...]    (no group: all, in order of importance)
"""

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from fewer_rollouts_arms import PROBLEMS, Arm, Target
from fewer_rollouts_groups import GROUPS
from lightning.pytorch import Trainer, seed_everything
from sandbox_runs import RESULTS as FOLDER
from sandbox_runs import Trajectory, facts, fit, run_missing

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.interfaces import RolloutEngine, Sampling
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule
from opd_lightning.training.schedules import WarmupDecay

RESULTS = FOLDER / "fewer_rollouts_cpu-2core.jsonl"
LONGEST_PAUSE = 16  # updates between evaluations within a round


class Counting(RolloutEngine):
    """Counts the processor seconds of this process, the calls, the rollouts and the tokens of all that is generated."""

    def forget(self) -> None:
        """Count from nothing."""
        self.seconds, self.rounds, self.rollouts, self.tokens = 0.0, 0, 0, 0

    def generate(self, *args: Any, **options: Any) -> Any:
        """As the engine's own."""
        started = time.process_time()
        rollouts = super().generate(*args, **options)
        self.seconds += time.process_time() - started
        self.rounds += 1
        self.rollouts += len(rollouts)
        self.tokens += sum(len(rollout.response_ids) for rollout in rollouts)
        return rollouts


class ClockedEngine(Counting, HFEngine):
    """Generation as in training.

    Args:
        is_behind: Generate with the weights of the call before: rollouts are stale by one round.
    """

    def __init__(self, is_behind: bool = False) -> None:
        super().__init__(max_batch_size=512)
        self.is_behind = is_behind
        self.kept: Any = None
        self.forget()

    def sync(self, model: Any, weight_version: int) -> None:
        """As the engine's own, or with the weights of the round before."""
        if self.is_behind:
            now = copy.deepcopy(model).requires_grad_(False)
            model, self.kept = self.kept if self.kept is not None else now, now
        super().sync(model, weight_version)


class ClockedVLLM(Counting, VLLMColocatedEngine):
    """Generation with vLLM: in this process, or in a child whose processor seconds are not counted."""

    is_behind = False

    def __init__(self, own_process: bool) -> None:
        super().__init__({"max_num_seqs": 128, "enforce_eager": True}, own_process=own_process)
        self.forget()


class Costs(Trajectory):
    """What an arm has spent at every evaluation."""

    def __init__(self, arm: Arm, problem: Target, engine: ClockedEngine | ClockedVLLM) -> None:
        super().__init__(problem.num_held_out, arm.average)
        self.arm, self.problem, self.engine = arm, problem, engine
        self.since_evaluation = 0
        self.final: dict[str, float] = {}

    def begin(self, trainer: Trainer) -> None:
        self.engine.forget()

    def account(self, trainer: Trainer, module: Any, outputs: Any, batch: Any) -> bool:
        """Evaluate at the end of rounds, and now and then within long ones, but for runs that are far away."""
        self.since_evaluation += 1
        step = trainer.global_step
        is_last = step >= self.arm.max_updates or self.seconds >= self.problem.max_seconds
        is_far = float(trainer.callback_metrics["train/loss"]) > self.problem.no_use_above
        ends_round = outputs["ends_round"] and step % self.arm.evaluate_every == 0
        wanted = (ends_round or self.since_evaluation >= LONGEST_PAUSE) and (not is_far or self.arm.penalty)
        wanted = wanted or is_last or self.since_evaluation >= 4 * LONGEST_PAUSE
        if wanted:
            self.since_evaluation = 0
        return bool(wanted)

    def spent(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "updates": trainer.global_step,
            "rounds": self.engine.rounds,
            "rollouts": self.engine.rollouts,
            "tokens": self.engine.tokens,
            "seconds": round(self.seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "generation_seconds": round(self.engine.seconds, 3),
        }

    def is_over(self, points: Sequence[Mapping[str, Any]]) -> bool:
        readout, point = "averaged_" if self.arm.average else "", points[-1]
        there = point[f"{readout}kl"] <= self.problem.kl and point[f"{readout}accuracy"] >= self.problem.accuracy
        return bool(there or self.seconds >= self.problem.max_seconds)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last look, at more problems."""
        if num := self.problem.num_final:
            self.final = {"problems": num} | self.readings(trainer, pl_module, num)

    def add_point(self, trainer: Trainer, module: Any) -> None:
        """Without counting what evaluation generates, and with the weights as they are."""
        engine = self.engine
        kept = (engine.seconds, engine.rounds, engine.rollouts, engine.tokens)
        behind, engine.is_behind = engine.is_behind, False
        super().add_point(trainer, module)
        engine.is_behind = behind
        engine.seconds, engine.rounds, engine.rollouts, engine.tokens = kept


def run(arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, which decides prompts, samples and orders."""
    seed_everything(seed, verbose=False)
    problem = PROBLEMS[arm.target]
    engine = ClockedVLLM(own_process=arm.ahead) if arm.vllm or arm.ahead else ClockedEngine(arm.is_behind)
    costs = Costs(arm, problem, engine)
    module = OPDModule(
        HFStudent(problem.student, **arm.student_options()),
        HFTeacher(problem.teacher, dtype="float32"),
        objective=arm.make_objective(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=arm.lr, weight_decay=0.0),
        lr_scheduler=lambda optimizer: WarmupDecay(
            optimizer, decay="linear" if arm.decay else "constant", total_steps=arm.decay or None
        ),
        max_tokens_per_micro_batch=problem.max_tokens,
        top_k_metrics=1,  # the distance that ends rounds is among the facts
    )
    data = OPDDataModule(
        problem.make_task(),
        engine=engine,
        source=arm.make_source(),
        horizon=arm.make_horizon(),
        sampling=Sampling(max_new_tokens=problem.max_new_tokens),
        prompts_per_step=arm.rollouts // arm.mini_batches,
        num_reserved=50,
        seed=seed,
    )
    fit(module, data, [*arm.make_callbacks(), costs], arm.max_updates)
    bar = {"kl": problem.kl, "accuracy": problem.accuracy}
    record = {"settings": asdict(arm) | facts() | {"bar": bar}, "trajectory": costs.points}
    return record | ({"final": costs.final} if costs.final else {})


if __name__ == "__main__":
    run_missing(GROUPS, sys.argv[1:], run, lambda _: RESULTS)
