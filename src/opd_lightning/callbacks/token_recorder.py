"""`TokenRecorder`: what student and teacher thought of every token of a few answers, for the token view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.callbacks.token_rows import TokenRows
from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import Rollout, RolloutBatch
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.objectives.supports import DEFAULT_K
from opd_lightning.randomness import derive_seed
from opd_lightning.reports.token_records import FOLDER, steps_of, write_record
from opd_lightning.rollouts.inspection import InspectedRollout, Look, all_offered, inspect_rollouts
from opd_lightning.rollouts.records import from_record, to_record
from opd_lightning.training.module import OPDModule
from opd_lightning.training.output_paths import check_folder, run_folder

# of a record on the disk, measured on numbers that cannot be compressed (docs/tokens.md)
BYTES_OF_ALL = 16_000  # names and kinds of the columns
BYTES_PER_TOKEN, BYTES_PER_LISTED = 85, 20  # of an answer; for each place of its two lists besides
BYTES_PER_PROMPT_TOKEN = 10


class TokenRecorder(Callback):
    """Writes what both models thought of every token of a few rollouts, as parquet that others can read.

    In every so many steps, before the step trains: some of its own rollouts, chosen by a hash of their seeds, and the
    *fixed* answers, those of the first recorded step, which show how the student's mind changes about the very same
    tokens. At the end of fit the fixed ones once more. Recorded are divergences, entropies, log-probabilities, both
    top-k lists, the weight and the advantage of the training, prompts and marks (docs/tokens.md); what a teacher does
    not tell is null.

    Costs a pass of student and teacher without gradients over the recorded rollouts only, about 245 bytes a token on
    the disk with lists of 8, and nothing in the steps between. A record is there whole or not at all; a resumed run
    goes on in the folder of the first one, and records of steps that it does again are replaced. With several processes
    the first one writes. Works with `OPDModule`; the objective's `shape` and the token weighting are asked once more.

    Args:
        every_n_steps: Record at every so many training steps, the first included.
        num_rollouts: Own rollouts of a step, over all processes.
        num_fixed: Fixed answers.
        top_k: Tokens of each list.
        max_records: After so many steps only the last one is recorded.
        dirpath: Folder for the records; None is `tokens` in the folder of the run.

    Raises:
        ValueError: A number is out of range; when fit starts also when the folder holds another run's records.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        num_rollouts: int = 4,
        num_fixed: int = 4,
        top_k: int = 8,
        max_records: int = 200,
        dirpath: str | None = None,
    ) -> None:
        name = type(self).__name__
        check_at_least(1, name, every_n_steps=every_n_steps, top_k=top_k, max_records=max_records)
        check_at_least(0, name, num_rollouts=num_rollouts, num_fixed=num_fixed)
        if not num_rollouts + num_fixed:
            raise ValueError(
                "TokenRecorder.num_rollouts: expected at least 1 of num_rollouts and num_fixed together, got 0 of"
                " both. Leave the callback out to record nothing."
            )
        self.every_n_steps = every_n_steps
        self.num_rollouts, self.num_fixed = num_rollouts, num_fixed
        self.top_k = top_k
        self.max_records = max_records
        self.dirpath = dirpath
        self.folder: Path | None = None
        self.recorded: list[int] = []
        self.next_step = 0
        self.num_bytes = 0
        self._fixed: list[Rollout] = []
        self._fixed_records: list[dict[str, Any]] = []
        self._is_resumed = False
        self._rows: TokenRows | None = None

    # ------------------------------------------------------------------------------------------------------ life cycle

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, OPDModule):
            raise ValueError(
                f"TokenRecorder: it records what an OPDModule trains on, got {type(pl_module).__name__}. Leave it out."
            )
        folder = Path(trainer.strategy.broadcast(str(self.dirpath or self._default_folder(trainer))))
        check_folder("TokenRecorder.dirpath", folder)
        if self._is_resumed:
            self._go_on(trainer, pl_module, folder)
        else:
            self._begin(trainer, folder)
        self._is_resumed = False
        self.folder = folder
        self._rows = TokenRows(pl_module.spec.tokenizer, pl_module.teacher)
        longest = pl_module.data.sampling.max_new_tokens
        size = estimated_bytes((self.num_rollouts + self.num_fixed) * longest, self.top_k)
        say(
            trainer,
            f"TokenRecorder: every {self.every_n_steps} steps {self.num_rollouts} rollouts and {self.num_fixed} fixed"
            f" answers, about {size / 2**20:.2g} MiB at full length without prompts, in {folder}",
        )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if batch.step % self.every_n_steps:
            return
        if len(self.recorded) >= self.max_records:
            if len(self.recorded) == self.max_records:
                rank_zero_warn(
                    f"TokenRecorder.max_records: {self.max_records} steps are recorded; from here on only the last one"
                    " is. Set every_n_steps higher to spread them."
                )
            return
        assert isinstance(pl_module, OPDModule)
        own = _choose(batch.rollouts, self.num_rollouts)
        if not self._fixed:
            first = _choose(batch.rollouts, self.num_fixed)
            told = pl_module.give_context(batch.rollouts)  # without it a teacher that is shown something is another one
            chosen = gather_objects([told[place] for place in first])
            self._fix([rollout for part in chosen for rollout in part])
        shaped = pl_module.shape(batch)
        self._record(trainer, pl_module, batch.step, [shaped[place] for place in own], batch.staleness)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        self.next_step = batch.step + 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, OPDModule)
        if self._fixed and self.next_step > max(self.recorded, default=-1):
            self._record(trainer, pl_module, self.next_step, [], None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "folder": None if self.folder is None else str(self.folder),
            "recorded": list(self.recorded),
            "next_step": self.next_step,
            "fixed": list(self._fixed_records),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.folder = None if state_dict["folder"] is None else Path(state_dict["folder"])
        self.recorded, self.next_step = list(state_dict["recorded"]), state_dict["next_step"]
        self._fixed, self._fixed_records = [], list(state_dict["fixed"])
        self._is_resumed = True

    # ------------------------------------------------------------------------------------------------------- internals

    def _default_folder(self, trainer: Trainer) -> Path:
        """The folder of the run, or the one of the run that is resumed."""
        return self.folder if self._is_resumed and self.folder is not None else run_folder(trainer) / FOLDER

    def _begin(self, trainer: Trainer, folder: Path) -> None:
        if trainer.strategy.broadcast(bool(steps_of(folder))):
            raise ValueError(
                f"TokenRecorder.dirpath: {str(folder)!r} holds records already, and those of two runs cannot be told"
                " apart. Choose another folder, or remove them."
            )
        self.recorded, self.next_step, self.num_bytes = [], 0, 0
        self._fixed, self._fixed_records = [], []

    def _go_on(self, trainer: Trainer, module: OPDModule, folder: Path) -> None:
        """Forget what was recorded after the checkpoint: these steps are done again."""
        self.recorded = [step for step in self.recorded if step < self.next_step]
        later = {step: path for step, path in steps_of(folder).items() if step >= self.next_step}
        if trainer.is_global_zero and later:
            say(trainer, f"TokenRecorder: {len(later)} records from step {min(later)} on are made again in {folder}")
            for path in later.values():
                path.unlink()
        assert module.data.stream is not None
        wanted = {record["uid"] for record in self._fixed_records}
        problems = {problem.uid: problem for problem in module.data.stream.problems if problem.uid in wanted}
        self._fixed = [
            replace(from_record(record, problems[record["uid"]]), context=record.get("context", {}))  # older ones: none
            for record in self._fixed_records
        ]

    def _fix(self, rollouts: Sequence[Rollout]) -> None:
        """Choose the answers that are looked at in every record from now on."""
        self._fixed = sorted(rollouts, key=_order)[: self.num_fixed]
        self._fixed_records = [
            to_record(rollout) | {"uid": rollout.problem.uid, "context": dict(rollout.context)}
            for rollout in self._fixed
        ]

    def _record(
        self, trainer: Trainer, module: OPDModule, step: int, own: Sequence[Rollout], staleness: int | None
    ) -> None:
        assert self.folder is not None and self._rows is not None
        fixed = self._fixed[trainer.global_rank :: trainer.world_size]
        rows = [
            *self._rows.rows(self._inspect(module, own, is_trained=True), step, "own", staleness),
            *self._rows.rows(self._inspect(module, fixed, is_trained=False), step, "fixed", None),
        ]
        gathered = [row for part in gather_objects(rows) for row in part]
        gathered.sort(key=lambda row: (row["kind"] == "fixed", derive_seed(row["seed"], row["uid"])))
        if trainer.is_global_zero:
            self.num_bytes += write_record(self.folder, step, gathered, self._header(module))
        self.recorded.append(step)

    def _inspect(self, module: OPDModule, rollouts: Sequence[Rollout], *, is_trained: bool) -> list[InspectedRollout]:
        rollouts = [rollout for rollout in rollouts if rollout.num_trained]
        needed, teacher = module.score_request or module.objective.request(), module.teacher
        look = Look(
            module.objective,
            module.token_weighting if is_trained else None,
            None if teacher is None else all_offered(teacher, needed, self.top_k),
            module.facts_k or DEFAULT_K,
            self.top_k,
            with_advantages=is_trained,
        )
        batches = module.make_micro_batches(rollouts)
        devices = [module.device] if module.device.type == "cuda" else []
        quiet = evaluation_mode(module.model), torch.random.fork_rng(devices), torch.no_grad()
        with quiet[0], quiet[1], quiet[2], module.autocast(), module.keeping_pace(len(batches)):
            return inspect_rollouts(module.spec, module.model, batches, teacher, look)

    def _header(self, module: OPDModule) -> dict[str, Any]:
        needed = module.objective.request()
        return {
            "teacher": None if module.teacher is None else type(module.teacher).__name__,
            "gives_vocabulary": module.teacher is not None and module.teacher.offer.full_vocabulary,
            "objective": type(module.objective).__name__,
            "student_temperature": module.objective.student_temperature,
            "teacher_temperature": 1.0 if needed is None else needed.temperature,
            "facts_k": module.facts_k or DEFAULT_K,
        }


def estimated_bytes(num_tokens: int, top_k: int, num_prompt_tokens: int = 0) -> int:
    """What a record with answers of so many tokens together takes on the disk; an estimate, no bound."""
    per_token = BYTES_PER_TOKEN + BYTES_PER_LISTED * top_k
    return BYTES_OF_ALL + num_tokens * per_token + num_prompt_tokens * BYTES_PER_PROMPT_TOKEN


def _order(rollout: Rollout) -> int:
    return derive_seed(rollout.seed, rollout.problem.uid)


def _choose(rollouts: Sequence[Rollout], number: int) -> list[int]:
    """Places of this process's share of so many rollouts of all: a function of their seeds, whoever holds them."""
    mine = [_order(rollout) for rollout in rollouts]
    chosen = sorted(order for part in gather_objects(mine) for order in part)[:number]
    limit = chosen[-1] if chosen else -math.inf
    return [place for place, order in enumerate(mine) if order <= limit]
