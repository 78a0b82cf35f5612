"""What applying one EffOPD candidate costs, against the time that moving the same bytes takes.

A candidate reads two points and writes one, so no implementation can beat three passes over the weights' bytes. The
floor is measured, not looked up: a copy and a sum of plain arrays of the same size, whichever reaches more bytes per
second. All are measured in turn, and ratios are taken turn by turn before their median: a machine busy with other
things then slows both sides of each ratio.

    python benchmarks/apply_candidate.py            # result in benchmarks/results/apply_candidate_<hardware>.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from opd_lightning.extrapolation import AnchoredWeights

RESULTS = Path(__file__).parent / "results"


def make_weights(num_layers: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str):
    """Weights with the shapes of a small language model, vectors included."""
    shapes = {"embed": (vocabulary, hidden), "norm": (hidden,)}
    for layer in range(num_layers):
        for name in ("q", "o"):
            shapes[f"{layer}.{name}"] = (2 * hidden, hidden)
        for name in ("k", "v"):
            shapes[f"{layer}.{name}"] = (hidden, hidden)
        for name in ("gate", "up", "down"):
            shapes[f"{layer}.{name}"] = (3 * hidden, hidden)
        for name in ("input_norm", "output_norm"):
            shapes[f"{layer}.{name}"] = (hidden,)
    return {name: nn.Parameter(torch.randn(shape, device=device).to(dtype)) for name, shape in shapes.items()}


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(dtype: torch.dtype, device: str, repeats: int, **sizes: int) -> dict:
    """Times of candidate, restore, the alternative with foreach kernels, and the two plain array operations."""
    parameters = make_weights(**sizes, dtype=dtype, device=device)
    anchored = AnchoredWeights(parameters)
    with torch.no_grad():
        for weight in parameters.values():
            weight += 0.01
    anchored.begin()
    num_entries = sum(weight.numel() for weight in parameters.values())
    x, y, z = (torch.zeros(num_entries, dtype=dtype, device=device) for _ in range(3))
    anchors, saved = list(anchored._anchors.values()), list(anchored._saved.values())
    live = [weight.detach() for weight in parameters.values()]

    def with_foreach() -> None:
        torch._foreach_copy_(live, anchors)
        torch._foreach_lerp_(live, saved, 3.0)

    work = {
        "candidate": lambda: anchored.move_to(2.0),
        "restore": lambda: anchored.move_to(0.0),
        "candidate_with_foreach": with_foreach,
        "plain_copy": lambda: z.copy_(x),
        "plain_sum": lambda: torch.add(x, y, out=z),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 2):
        for name, function in work.items():
            elapsed = seconds(function, device)
            if repeat >= 2:
                times[name].append(elapsed)
    floors = [min(1.5 * a, b) for a, b in zip(times["plain_copy"], times["plain_sum"], strict=True)]
    floor = statistics.median(floors)

    def over_floor(name: str) -> float:
        return statistics.median(t / f for t, f in zip(times[name], floors, strict=True))

    return {
        "dtype": str(dtype).removeprefix("torch."),
        "num_weights": len(parameters),
        "num_entries": num_entries,
        "floor_s": floor,
        "bandwidth_gb_per_s": 3e-9 * num_entries * x.element_size() / floor,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "candidate_over_floor": over_floor("candidate"),
        "foreach_over_floor": over_floor("candidate_with_foreach"),
        "restore_over_its_floor": 1.5 * over_floor("restore"),
        "times_s": times,
    }


def hardware(device: str) -> str:
    """Short name of the machine for file names."""
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{os.cpu_count()}core"


def main() -> None:
    """Measure, print one line per dtype, write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32768)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {"num_layers": options.num_layers, "hidden": options.hidden, "vocabulary": options.vocabulary}
    results = [measure(dtype, options.device, options.repeats, **sizes) for dtype in (torch.float32, torch.bfloat16)]
    for result in results:
        print(
            f"{result['dtype']}: {result['num_entries'] / 1e6:.0f}M entries, floor {1e3 * result['floor_s']:.1f} ms at "
            f"{result['bandwidth_gb_per_s']:.1f} GB/s, candidate {result['candidate_over_floor']:.2f} x floor "
            f"(with foreach kernels {result['foreach_over_floor']:.2f}), restore "
            f"{result['restore_over_its_floor']:.2f} x its floor"
        )
    machine = {"hardware": hardware(options.device), "processor": platform.processor() or platform.machine()}
    machine |= {"threads": options.threads}
    record = machine | {"torch": torch.__version__, "python": platform.python_version(), "sizes": sizes}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"apply_candidate_{machine['hardware']}.json"
    path.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
