"""All that needs a GPU to be known, by one command and within some minutes; one file of results, named after the GPU.

Runs the tests marked `gpu`, the loss at the sizes of real heads, whole training steps with students and teachers of
0.6 and 1.7 billion random weights, and compares their peaks of memory with what `opd-lightning plan` says. What cannot
run is left out, and the results say why. Needs nothing that `pip install .` does not bring; each part is a process of
its own, so that one that fails takes nothing with it.

    python benchmarks/gpu_suite.py --minutes 8
    python benchmarks/gpu_suite.py --tiny --out FILE    # tiny sizes on the CPU: only shows that the suite works
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_suite_parts import PARTS, LeftOut, Place, installed

RESULTS = Path(__file__).parent / "results"


def hardware_name(is_tiny: bool) -> str:
    """What the results are of, fit for the name of a file."""
    name = f"tiny_cpu_{platform.machine()}" if is_tiny else torch.cuda.get_device_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe_machine(is_tiny: bool) -> dict[str, Any]:
    """What ran it."""
    names = ("torch", "transformers", "lightning", "opd-lightning", "flash-attn", "bitsandbytes", "accelerate")
    facts: dict[str, Any] = {"versions": {name: installed(name) for name in names}}
    facts |= {"python": platform.python_version(), "cores": os.cpu_count(), "is_tiny": is_tiny}
    if not is_tiny:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return facts


def run_part(name: str, is_tiny: bool, folder: Path, seconds: float) -> dict[str, Any]:
    """What a part found, or why it is left out, from a process that has so many seconds."""
    if seconds < 1:
        return {"left_out": "no time was left; give more --minutes"}
    out = folder / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
    command = [sys.executable, __file__, "--part", name, "--out", str(out), *(["--tiny"] if is_tiny else [])]
    log = folder / "log.txt"
    started = time.perf_counter()
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                [*command, "--folder", str(folder)], stdout=stream, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return {"left_out": f"did not end within the {seconds:.0f} seconds that were left; give more --minutes"}
    took = {"seconds_in_all": round(time.perf_counter() - started, 1)}
    if out.exists():
        return json.loads(out.read_text()) | took
    return {"left_out": f"ended with exit code {code}", "last_lines": log.read_text().splitlines()[-15:]} | took


def run_suite(is_tiny: bool, minutes: float, only: Sequence[str]) -> dict[str, Any]:
    """All parts, one after the other, until the time is up."""
    until = time.perf_counter() + 60 * minutes
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in only or PARTS:
            parts[name] = run_part(name, is_tiny, Path(folder), until - time.perf_counter())
            print(f"{name}: {parts[name].get('left_out') or json.dumps(parts[name].get('summary'))}", flush=True)
    return {"machine": describe_machine(is_tiny), "parts": parts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the suite, or one part of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: shows that it works, nothing else")
    parser.add_argument("--only", action="append", choices=list(PARTS), default=[])
    parser.add_argument("--out", type=Path, help="file of results; else benchmarks/results/gpu_suite_<gpu>.json")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device is there. With --tiny --out FILE the suite tries itself out on the CPU.")
    if given.tiny and given.out is None:
        parser.error("--tiny needs --out FILE: sizes this small are no results.")
    if given.part is not None:
        try:
            found = PARTS[given.part](Place(given.tiny, given.folder))
        except LeftOut as reason:
            found = {"left_out": str(reason)}
        given.out.write_text(json.dumps(found))
        return
    result = run_suite(given.tiny, given.minutes, given.only)
    out = given.out or RESULTS / f"gpu_suite_{hardware_name(given.tiny)}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
