"""Training end to end: our `fit` beside TRL's `DistillationTrainer` and a loop written by hand.

Same models (random weights, made from configurations), prompts, lengths, dtype (float32), objective (reverse KL over
the whole vocabulary), optimiser and machine; a process each, which take turns step by step. Times are processor
seconds, because the machine may be busy with other things; ratios are taken turn by turn before their median. A step of
ours is also set against its floor: operations at the best rate of this machine's matrix products, bytes at its
bandwidth.

    pip install -e .[bench]
    python benchmarks/throughput.py               # result in benchmarks/results/throughput_<hardware>.json
    python benchmarks/throughput.py --products    # what the step's matrix products take alone, at their own sizes
    python benchmarks/throughput.py --growth      # how the seconds of our steps grow with what
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from throughput_models import Product, Shape, Work

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CASES = {
    "16 x 64, V 32,000": Work(),
    "64 x 128, V 32,000": Work(num_rollouts=64, max_new_tokens=128),
    "8 x 32, V 151,936": Work(vocabulary=151_936, num_rollouts=8, max_new_tokens=32),
    "tiny": Work(64, Shape(32, 1, 32), Shape(48, 1, 48), num_rollouts=2, max_new_tokens=4, prompt_tokens=4),
}
SMALL = Work(8_000, Shape(128, 2, 352), Shape(192, 2, 512), num_rollouts=8, max_new_tokens=64)
GROWTH = {
    "rollouts": [replace(SMALL, num_rollouts=n) for n in (8, 32, 128)],
    "tokens of a rollout": [replace(SMALL, max_new_tokens=n) for n in (64, 256, 1024)],
    "V": [replace(SMALL, vocabulary=n) for n in (8_000, 32_000, 128_000)],
    "k": [replace(SMALL, top_k=n) for n in (16, 64, 256)],
    "parameters": [replace(SMALL, student=Shape(w, 2, 11 * w // 4), vocabulary=2_000) for w in (256, 512, 1024)],
}


class Contender:
    """A trainer in a process of its own.

    Args:
        name: Which.
        work: A step of its.
        folder: Where models are.
    """

    def __init__(self, name: str, work: Work, folder: Path) -> None:
        command = [sys.executable, str(HERE / "throughput_contenders.py"), name, work.written(), str(folder)]
        self._errors = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._name = name
        self._read()

    def step(self) -> dict[str, Any]:
        """What one step took."""
        return self._ask("go")

    def stop(self) -> dict[str, float]:
        """Its peaks of memory; it has ended."""
        peaks = self._ask("stop")
        self._process.wait()
        return peaks

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self._name} ended early:\n{self._errors.read()[-3000:]}")
        return json.loads(line)


def race(work: Work, names: Sequence[str], num_steps: int, folder: Path, warm_up: int = 1) -> dict[str, Any]:
    """Steps of all contenders in turn, the first ones of each not counted, and their peaks of memory."""
    contenders = {name: Contender(name, work, folder) for name in names}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(num_steps + warm_up):
        for name, contender in contenders.items():
            step = contender.step()
            print(f"{name}: {step['seconds']:.2f} s, {step['tokens']} tokens", file=sys.stderr, flush=True)
            if turn >= warm_up:
                steps[name].append(step)
    return {"steps": steps, "peaks": {name: contender.stop() for name, contender in contenders.items()}}


def machine_rates() -> dict[str, float]:
    """Best rate of matrix products and best bandwidth of one thread, in processor time."""
    torch.set_num_threads(1)
    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    large = torch.zeros(2**26)

    def best(work: Any, repeats: int = 10) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        return min(seconds)

    return {
        "flops": 2 * 1024**3 / best(lambda: torch.mm(a, b, out=out)),
        "bytes_per_second": 2 * 4 * large.numel() / best(lambda: large.add_(1)),
    }


def products_alone(work: Work) -> dict[str, float]:
    """Seconds of the matrix products of each part of a step, each by itself over and over, into memory that is there.

    A product of few rows runs far below the machine's best rate: this is what code that calls them cannot go below.
    """
    from opd_lightning import DivergenceObjective

    torch.set_num_threads(1)
    seconds = {}
    for part, products in work.products(DivergenceObjective().chunk_tokens).items():
        seconds[part] = sum(each.times * seconds_of(each) for each in products)
    return seconds


def seconds_of(product: Product, turns: int = 5) -> float:
    """Processor seconds of one, in the median turn; factors lie as layers have them."""
    left, right = torch.randn(product.rows, product.inner), torch.randn(product.columns, product.inner)
    out = torch.empty(product.rows, product.columns)
    times = max(1, int(2e8 / (product.rows * product.inner * product.columns)))
    taken = []
    for _ in range(turns + 1):
        start = time.process_time()
        for _ in range(times):
            torch.mm(left, right.T, out=out)
        taken.append((time.process_time() - start) / times)
    return statistics.median(taken[1:])


def summarize(work: Work, found: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """Medians, spread, and ours against the others and against the floor."""
    summary: dict[str, Any] = {}
    speeds = {name: [s["tokens"] / s["seconds"] for s in steps] for name, steps in found["steps"].items()}
    for name, values in speeds.items():
        ratios = [ours / other for ours, other in zip(speeds["ours"], values, strict=True)]
        peak = found["peaks"][name]["peak_mib_above_imports"]
        summary[name] = {
            "median_seconds": statistics.median(s["seconds"] for s in found["steps"][name]),
            "median_tokens_per_second": statistics.median(values),
            "spread_tokens_per_second": [min(values), max(values)],
            "ours_times_as_fast": [statistics.median(ratios), min(ratios), max(ratios)],
            "peak_mib": peak,
            "ours_of_its_memory": found["peaks"]["ours"]["peak_mib_above_imports"] / peak,
        }
    floor = work.floor(rates["flops"], rates["bytes_per_second"])
    parts = {part: statistics.median(s["parts"][part] for s in found["steps"]["ours"]) for part in floor}
    parts["rest"] = statistics.median(s["seconds"] - sum(s["parts"].values()) for s in found["steps"]["ours"])
    summary["parts"] = {part: {"seconds": parts[part], "floor": floor.get(part, 0.0)} for part in parts}
    summary["step_over_floor"] = summary["ours"]["median_seconds"] / sum(floor.values())
    return summary


def measure_growth(num_steps: int, folder: Path) -> dict[str, Any]:
    """Exponents: logarithm of how much more a step costs, over that of how much more there is to do."""
    found: dict[str, Any] = {}
    for name, works in GROWTH.items():
        seconds = []
        for work in works:
            steps = race(work, ["ours"], num_steps, folder)["steps"]["ours"]
            seconds.append(statistics.median(step["seconds"] for step in steps))
        sizes = [size_of(name, work) for work in works]
        exponents = [
            math.log(seconds[i + 1] / seconds[i]) / math.log(sizes[i + 1] / sizes[i]) for i in range(len(sizes) - 1)
        ]
        found[name] = {"sizes": sizes, "seconds": seconds, "exponents": exponents}
        print(f"{name} {sizes}: {[round(s, 3) for s in seconds]} s, exponents {[round(e, 2) for e in exponents]}")
    return found


def size_of(name: str, work: Work) -> int:
    """How much there is of what grows."""
    return {
        "rollouts": work.num_rollouts,
        "tokens of a rollout": work.max_new_tokens,
        "V": work.vocabulary,
        "k": work.top_k,
        "parameters": work.student.body + work.student.hidden * work.vocabulary,
    }[name]


def table(case: str, summary: dict[str, Any]) -> str:
    """For people."""
    lines = [case]
    for name in (name for name in summary if name not in ("parts", "step_over_floor")):
        row = summary[name]
        fast, least, most = row["ours_times_as_fast"]
        lines.append(
            f"  {name}: {row['median_seconds']:.2f} s, {row['median_tokens_per_second']:.0f} tokens/s; ours"
            f" {fast:.2f}x [{least:.2f}, {most:.2f}] as fast; {row['peak_mib']:.0f} MiB, ours"
            f" {row['ours_of_its_memory']:.2f} of it"
        )
    parts = ", ".join(f"{part} {v['seconds']:.2f} ({v['floor']:.2f})" for part, v in summary["parts"].items())
    return "\n".join([*lines, f"  seconds of ours (floor): {parts}; {summary['step_over_floor']:.2f} x the floor"])


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, add the raw values to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=1, help="steps of each that are not counted")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--growth", action="store_true", help="measure growth instead")
    parser.add_argument("--products", action="store_true", help="measure the products alone instead")
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput_cpu-2core.json")
    given = parser.parse_args(arguments)
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores shared with other work, 1 thread"
    result["versions"] = {name: installed(name) for name in ("torch", "transformers", "lightning", "trl")}
    names = ["ours", "TRL", "plain loop"] if installed("trl") else ["ours", "plain loop"]
    if "TRL" not in names:
        print("TRL is left out: it is not installed (extra `bench`).")
    with tempfile.TemporaryDirectory() as folder:
        if given.growth:
            result["growth"] = measure_growth(given.steps, Path(folder))
        cases = given.case or [name for name in CASES if name != "tiny"]
        for case in cases if given.products else []:
            seconds = products_alone(CASES[case])
            result.setdefault("products", {})[case] = {"rates": machine_rates(), "seconds": seconds}
            print(case, {part: round(value, 2) for part, value in seconds.items()})
        for case in [] if given.growth or given.products else cases:
            rates = machine_rates()
            found = race(CASES[case], names, given.steps, Path(folder), given.warm_up)
            result[case] = {"rates": rates, "summary": summarize(CASES[case], found, rates), **found}
            print(table(case, result[case]["summary"]), flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
