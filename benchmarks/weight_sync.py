"""What it costs to hand a live student's weights to a vLLM in this process, against copying them tensor by tensor.

Processor seconds of one thread. Three things take turns: an update past vLLM's reload (`packed_layers`), one through it
as all were before, and the copy.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/weight_sync.py --output benchmarks/results/weight_sync_cpu-2core.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rollout_workloads import ENGINE_ARGS, SIZES, make_counter

from opd_lightning.backends.hf import HFStudent
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine


def processor_seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(folder: Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Seconds of `repeats` updates by each way and of as many copies, in turn."""
    student = HFStudent(str(folder))
    model = student.load()
    engine = VLLMColocatedEngine({**ENGINE_ARGS, "kv_cache_memory_bytes": 2**28, "dtype": dtype})
    engine.setup(student, torch.device("cpu"))
    engine.sync(model, 0)
    (transfer,) = engine._llm.collective_rpc(lambda worker: worker.weight_transfer_engine)
    layers = transfer._layers
    assert layers is not None, "this model is not loaded past the reload"
    weights = [weight.detach() for weight in model.parameters()]
    copies = [torch.empty_like(weight) for weight in weights]
    seconds: dict[str, list[float]] = {"packed": [], "reload": [], "copy": []}
    for version in range(1, 2 * repeats + 5, 2):
        transfer._layers = layers
        packed = processor_seconds(lambda: engine.sync(model, version))  # noqa: B023
        transfer._layers = None
        reload = processor_seconds(lambda: engine.sync(model, version + 1))  # noqa: B023
        copy = processor_seconds(lambda: [to.copy_(weight) for to, weight in zip(copies, weights, strict=True)])
        if version > 4:
            for name, value in {"packed": packed, "reload": reload, "copy": copy}.items():
                seconds[name].append(value)
    engine.close()
    return {
        "bytes": sum(weight.nbytes for weight in weights),
        "dtype": dtype,
        "seconds": seconds,
        "over_copy": {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds["copy"], strict=True))
            for name in ("packed", "reload")
        },
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["10M", "35M"], choices=SIZES)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes:
            results[name] = measure(make_counter(Path(folder) / name, SIZES[name]), "float32", options.repeats)
            print(name, results[name]["bytes"], results[name]["over_copy"], flush=True)
    if options.output is not None:
        about = {"torch": torch.__version__, "threads": 1, "load": os.getloadavg()}
        options.output.write_text(json.dumps({"about": about, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
