"""Run by test_vllm_servers.py: fits of a student that two processes share, with rollouts from real vLLMs."""

import json
import sys
from pathlib import Path

from engine_pair import ENGINE_ARGS
from lightning.pytorch.callbacks import Callback
from toys import adamw, make_data, make_module, make_trainer

from opd_lightning import FSDP2Strategy
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.backends.vllm.server import Connection, FileTransfer, VLLMServerEngine
from opd_lightning.distributed import gather_objects, is_sharded
from opd_lightning.interfaces import Sampling


class CountingTransfer(FileTransfer):
    """Counts what it sends."""

    def __init__(self):
        super().__init__()
        self.num_pushes = 0

    def push(self, pool, read_weights, weight_version):
        self.num_pushes += 1
        super().push(pool, read_weights, weight_version)


class Notes(Callback):
    """What each step of each process found."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert is_sharded(pl_module.model)
        told = [rollout.response_ids.tolist() for rollout in batch.rollouts]
        values = {name: float(trainer.callback_metrics[f"train/{name}"]) for name in ("rollout_mismatch", "staleness")}
        self.steps.append({"rollouts": gather_objects(told)} | values)


def fit(student, teacher, engine, output, num_steps=3):
    """A whole run; returns its steps."""
    notes = Notes()
    module = make_module(student, teacher, optimizer=adamw, max_tokens_per_micro_batch=64)
    data = make_data(engine=engine, sampling=Sampling(max_new_tokens=8))
    strategy = FSDP2Strategy()
    trainer = make_trainer(output, num_steps, devices=2, strategy=strategy, callbacks=[notes])
    trainer.fit(module, data)
    return trainer.global_rank, notes.steps


def main(student, teacher, url, output):
    transfer = CountingTransfer()
    engines = {
        "server": VLLMServerEngine(Connection([url], patience=900.0), transfer=transfer),
        "colocated": VLLMColocatedEngine(ENGINE_ARGS),
    }
    found = {}
    for name, engine in engines.items():
        rank, found[name] = fit(student, teacher, engine, Path(output))
    found["pushes"] = gather_objects(transfer.num_pushes)
    if rank == 0:
        (Path(output) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
