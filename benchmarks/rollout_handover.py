"""Two sections of `rollout_throughput.py`: what it costs to hand weights to an engine, and rollouts to a teacher.

A server and this process have one core each, fixed by their affinity.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rollout_workloads import (
    CONTEXT,
    ENGINE_ARGS,
    OWN_CORE,
    SERVER_CORE,
    SIZES,
    ZERO,
    CountingTask,
    ServerProcess,
    make_counter,
    make_prompts,
)

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.backends.vllm.server import Connection, VLLMServerEngine, VLLMServerTeacher
from opd_lightning.interfaces import MicroBatch, Rollout, RolloutEngine, Sampling, ScoreRequest, Teacher
from opd_lightning.rollouts.batching import collate, cut_by_tokens

CPU = torch.device("cpu")


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of each list."""
    return {name: statistics.median(numbers) for name, numbers in values.items()}


class CopyFloor:
    """The least that taking weights over can cost: their bytes copied once, or written to a file and read again."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self.source = torch.ones(num_bytes, dtype=torch.uint8)
        self.target = torch.zeros(num_bytes, dtype=torch.uint8)
        self.path = folder / "floor"

    def memory(self) -> None:
        """One copy between arrays that are there."""
        self.target.copy_(self.source)

    def file(self) -> None:
        """Write a file in shared memory and read it."""
        with self.path.open("wb") as file:
            file.write(memoryview(self.source.numpy()))
        with self.path.open("rb") as file:
            file.readinto(memoryview(self.target.numpy()))
        self.path.unlink()


def measure_sync(folder: Path, repeats: int) -> dict:
    """Seconds of `sync` by three ways for two model sizes, in turn with the floors; three times the repeats."""
    os.sched_setaffinity(0, OWN_CORE)
    return {name: time_sync(make_counter(folder / name, SIZES[name]), folder, 3 * repeats) for name in SIZES}


def time_sync(model_folder: Path, folder: Path, repeats: int) -> dict:
    """One model size."""
    student = HFStudent(str(model_folder))
    model = student.load()
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with ServerProcess(model_folder, folder / "log", SERVER_CORE, CONTEXT) as server, shared_memory() as shared:
        floor = CopyFloor(num_bytes, shared)
        engines: dict[str, RolloutEngine] = {
            "vllm": VLLMColocatedEngine(ENGINE_ARGS),
            "vllm child": VLLMColocatedEngine(ENGINE_ARGS, own_process=True),
            "vllm server": VLLMServerEngine(Connection([server.url])),
        }
        for engine in engines.values():
            engine.setup(student, CPU)
            engine.sync(model, 0)
        seconds: dict[str, list[float]] = {name: [] for name in (*engines, "copy", "file")}
        for version in range(1, repeats + 3):
            times = {name: seconds_of(partial(engine.sync, model, version)) for name, engine in engines.items()}
            times |= {"copy": seconds_of(floor.memory), "file": seconds_of(floor.file)}
            if version > 2:
                for name, value in times.items():
                    seconds[name].append(value)
        for engine in engines.values():
            engine.close()
    floors = {"vllm": "copy", "vllm child": "file", "vllm server": "file"}
    over = {
        name: statistics.median(s / f for s, f in zip(seconds[name], seconds[least], strict=True))
        for name, least in floors.items()
    }
    print(f"{num_bytes / 1e6:.0f} MB, ms: { {name: round(1e3 * s, 1) for name, s in medians(seconds).items()} }")
    return {"bytes": num_bytes, "seconds": seconds, "median_seconds": medians(seconds), "over_floor": over}


@contextmanager
def shared_memory() -> Iterator[Path]:
    """A folder in shared memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def measure_teacher(folder: Path, repeats: int) -> dict:
    """Scoring of 64 rollouts of mixed lengths by a 10M teacher: here, by a server, by a server while generating."""
    os.sched_setaffinity(0, OWN_CORE)
    size = SIZES["10M"]
    student = HFStudent(str(make_counter(folder / "student", size, seed=0)))
    teacher_folder = make_counter(folder / "teacher", size, seed=1)
    model, engine = student.load(), VLLMColocatedEngine(ENGINE_ARGS)
    engine.setup(student, CPU)
    engine.sync(model, 0)
    local = HFTeacher(str(teacher_folder), dtype="float32")
    problems = CountingTask(num_train=64 * repeats).problems("train")
    sampling = Sampling(max_new_tokens=256, stop_ids=[ZERO])
    with ServerProcess(teacher_folder, folder / "log", SERVER_CORE, CONTEXT) as server:
        remote = VLLMServerTeacher(Connection([server.url]))
        for teacher in (local, remote):
            teacher.setup(student, model, CPU)
        wire = count_bytes(remote)
        results = {}
        for k in (0, 20):
            request = ScoreRequest(top_k=k)
            rounds = []
            for repeat in range(repeats):
                prompts = make_prompts(problems[64 * repeat : 64 * (repeat + 1)], student.tokenizer, repeat)
                generate = partial(engine.generate, prompts, sampling)
                rounds.append(score_once(generate, local, remote, request, wire, step=len(rounds) + repeats * k))
            results[f"k={k}"] = summarize_rounds(rounds)
            print(f"k={k}: {results[f'k={k}']['medians']}", flush=True)
        remote.close()
    engine.close()
    return results


def score_once(
    generate: Callable[..., list[Rollout]],
    local: Teacher,
    remote: Teacher,
    request: ScoreRequest,
    wire: dict[str, int],
    step: int,
) -> dict[str, float]:
    """Generate and score the same rollouts in every way."""
    rollouts: list[Rollout] = []
    generate_alone = seconds_of(lambda: rollouts.extend(generate()))
    batches = [collate(group, 0) for group in cut_by_tokens(rollouts, 4096)]
    times = {
        "generate": generate_alone,
        "local": seconds_of(lambda: use_scores(local, batches, request)),
    }
    wire.update(sent=0, received=0)
    times["server"] = seconds_of(lambda: use_scores(remote, batches, request))
    moved = {f"{way}_bytes": float(number) for way, number in wire.items()}
    times["generate_and_prefetch"] = seconds_of(
        lambda: generate(lambda rollout: remote.prefetch(rollout, request, step))
    )
    times["waited"] = seconds_of(lambda: use_scores(remote, batches, request))
    return (
        times
        | moved
        | {
            "tokens": float(sum(len(rollout.response_ids) for rollout in rollouts)),
            "tokens_with_prompts": float(sum(len(r.response_ids) + len(r.prompt_ids) for r in rollouts)),
            "hidden_share": 1 - times["waited"] / times["server"],
            # what overlapping slows generation down by, counted as not hidden
            "saved_share": 1 - (times["generate_and_prefetch"] + times["waited"] - generate_alone) / times["server"],
        }
    )


def use_scores(teacher: Teacher, batches: Sequence[MicroBatch], request: ScoreRequest) -> None:
    """Ask for the scores of a step and look at all of them."""
    for scores in teacher.score_all(batches, request):
        with torch.no_grad():
            scores.sampled()
            if request.top_k:
                scores.topk(request.top_k)


def count_bytes(teacher: VLLMServerTeacher) -> dict[str, int]:
    """Bytes of the bodies that the teacher sends and receives from now on; the caller may set them back to 0."""
    wire, lock = {"sent": 0, "received": 0}, threading.Lock()

    def note(response: Any) -> None:
        received = len(response.read())
        with lock:
            wire["sent"] += len(response.request.content)
            wire["received"] += received

    assert teacher._pool is not None
    for server in teacher._pool.servers:
        server._http.event_hooks = {"response": [note]}
    return wire


def summarize_rounds(rounds: list[dict[str, float]]) -> dict:
    """Medians, and what they mean per token of whole sequences: prompts are scored too."""
    columns = {name: [one[name] for one in rounds] for name in rounds[0]}
    tokens = columns["tokens_with_prompts"]
    per_token = {
        f"{way}_seconds_per_1000_tokens": [1e3 * s / n for s, n in zip(columns[way], tokens, strict=True)]
        for way in ("local", "server")
    }
    bodies = zip(columns["sent_bytes"], columns["received_bytes"], tokens, strict=True)
    per_token["bytes_per_token"] = [(sent + received) / n for sent, received, n in bodies]
    return {"rounds": rounds, "medians": medians(columns | per_token)}
