"""How fast vLLM generates, takes weights over and scores, beside the Hugging Face backend, on this machine.

Sections, each in a process of its own:

    generation  tokens per second of `HFEngine` and `VLLMColocatedEngine` on the same weights and prompts
    two-threads the same for the first workload, with both cores for each engine in turn
    sync        seconds to hand the weights over, against the time that copying the same bytes takes
    teacher     `HFTeacher` against `VLLMServerTeacher`: time, bytes, and how much hides behind generation
    steps       where the time of whole training steps goes
    ahead       the same with generation one step ahead

Everything that is compared is measured in turn, repeat by repeat, and ratios are taken repeat by repeat before their
median: a machine busy with other things then slows both sides of each ratio. Vocabulary and layers of the models that
count down are ordinary, their responses are exactly as long as asked (see rollout_workloads.py).

    python benchmarks/rollout_throughput.py [SECTION ...]   # benchmarks/results/rollout_throughput_<hardware>.json

Needs vLLM (the CPU build: docs/vllm.md) and two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rollout_handover import measure_sync, measure_teacher
from rollout_steps import measure_ahead, measure_steps
from rollout_workloads import (
    ENGINE_ARGS,
    SIZES,
    ZERO,
    long_tailed,
    make_counter,
    make_problems,
    make_prompts,
)

from opd_lightning.backends.hf import HFEngine, HFStudent
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.interfaces import Prompt, Rollout, RolloutEngine, Sampling
from opd_lightning.tasks import ArithmeticTask

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # the CPU build would compile kernels of the sampler for half a minute
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "hf": HFEngine,
    "vllm": lambda: VLLMColocatedEngine(ENGINE_ARGS),
    "vllm child": lambda: VLLMColocatedEngine(ENGINE_ARGS, own_process=True),
    "vllm child, blocks of 128": lambda: VLLMColocatedEngine({**ENGINE_ARGS, "block_size": 128}, own_process=True),
}


@dataclass(frozen=True)
class Workload:
    """Prompts for one measurement.

    Attributes:
        make_prompts: From the number of the repeat.
        sampling: How they are answered.
        engines: Who answers them.
    """

    make_prompts: Callable[[int], list[Prompt]]
    sampling: Sampling
    engines: tuple[str, ...] = ("hf", "vllm")


def counting_workloads(student: HFStudent) -> dict[str, Workload]:
    """What the counting model is asked; the most important first."""

    def workload(
        num: int,
        length: int | None,
        prompt_lengths: tuple[int, int] = (16, 64),
        samples: int = 1,
        shared: int = 0,
        engines: tuple[str, ...] = ("hf", "vllm"),
    ) -> Workload:
        def prompts_of(repeat: int) -> list[Prompt]:
            generator = torch.Generator().manual_seed(repeat)
            lengths = long_tailed(num, generator) if length is None else [length] * num
            low, high = prompt_lengths
            own = torch.randint(low, high + 1, (num,), generator=generator).tolist()
            return make_prompts(make_problems(lengths, own, generator, shared), student.tokenizer, repeat, samples)

        longest = 256 if length is None else length
        return Workload(prompts_of, Sampling(max_new_tokens=longest, stop_ids=[ZERO]), engines)

    children = ("hf", "vllm", "vllm child", "vllm child, blocks of 128")
    return {
        "256 sequences, mixed lengths": workload(256, None, engines=children[:3]),
        "256 sequences of 32 tokens": workload(256, 32),
        "16 prompts of 256 tokens, 8 samples of 32": workload(16, 32, (256, 256), samples=8, engines=children),
        "the same, 192 tokens shared by all": workload(16, 32, (256, 256), samples=8, shared=192),
        "64 sequences, mixed lengths": workload(64, None),
        "16 sequences, mixed lengths": workload(16, None),
        "4 sequences of 64 tokens": workload(4, 64),
        "4 sequences of 256 tokens": workload(4, 256),
        "4 sequences of 1024 tokens": workload(4, 1024),
    }


def sandbox_workloads(student: HFStudent) -> dict[str, Workload]:
    """What the shipped student is asked: 256 problems of its task."""
    problems = ArithmeticTask().problems("train")

    def prompts_of(repeat: int) -> list[Prompt]:
        return make_prompts(problems[256 * repeat : 256 * (repeat + 1)], student.tokenizer, repeat)

    return {"256 sandbox problems": Workload(prompts_of, Sampling(max_new_tokens=72), ("hf", "vllm", "vllm child"))}


def check_counts(rollouts: list[Rollout], name: str) -> None:
    """Every engine must have counted down to zero from where it was told to start."""
    for rollout in rollouts:
        expected = torch.arange(int(rollout.prompt_ids[-1]) - 1, ZERO - 1, -1)
        assert torch.equal(rollout.response_ids, expected), f"{name}: {rollout.response_ids}"


def time_workloads(student: HFStudent, workloads: Mapping[str, Workload], repeats: int, counts: bool) -> dict:
    """Seconds and tokens of each workload by each engine, in turn; the first round is not counted."""
    model = student.load()
    engines = {name: make() for name, make in ENGINES.items() if any(name in w.engines for w in workloads.values())}
    warm_up = next(iter(workloads.values())).make_prompts(0)[:16]
    for engine in engines.values():
        engine.setup(student, torch.device("cpu"))
        engine.sync(model, 0)
        engine.generate(warm_up, Sampling(max_new_tokens=256, stop_ids=[ZERO]))
    results: dict[str, Any] = {}
    for name, workload in workloads.items():
        seconds: dict[str, list[float]] = {engine: [] for engine in workload.engines}
        tokens: dict[str, list[int]] = {engine: [] for engine in workload.engines}
        for repeat in range(repeats):
            prompts = workload.make_prompts(repeat)
            for engine in workload.engines:
                started = time.perf_counter()
                rollouts = engines[engine].generate(prompts, workload.sampling)
                seconds[engine].append(time.perf_counter() - started)
                tokens[engine].append(sum(len(rollout.response_ids) for rollout in rollouts))
                if counts:
                    check_counts(rollouts, f"{engine}, {name}")
        results[name] = {"seconds": seconds, "tokens": tokens} | summarize(seconds, tokens)
        print(f"{name}: {describe(results[name])}", flush=True)
    for engine in engines.values():
        engine.close()
    return results


def summarize(seconds: Mapping[str, list[float]], tokens: Mapping[str, list[int]]) -> dict:
    """Median speeds, and how much faster each engine is than the first."""
    speeds = {engine: [n / s for n, s in zip(tokens[engine], seconds[engine], strict=True)] for engine in seconds}
    first, *others = speeds
    ratios = {
        engine: sorted(mine / its for mine, its in zip(speeds[engine], speeds[first], strict=True)) for engine in others
    }
    return {
        "median_tokens_per_second": {engine: statistics.median(values) for engine, values in speeds.items()},
        "speed_over_" + first: {
            engine: {"median": statistics.median(values), "least": values[0], "most": values[-1]}
            for engine, values in ratios.items()
        },
    }


def describe(result: Mapping[str, Any]) -> str:
    """One line of a workload's result."""
    parts = [f"{engine} {speed:.0f} tokens/s" for engine, speed in result["median_tokens_per_second"].items()]
    parts += [
        f"{engine} {ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})"
        for engine, ratio in result["speed_over_hf"].items()
    ]
    return ", ".join(parts)


def measure_generation(folder: Path, repeats: int) -> dict:
    """All workloads on one thread."""
    student = HFStudent(str(make_counter(folder / "10M", SIZES["10M"])))
    counting = time_workloads(student, counting_workloads(student), repeats, counts=True)
    sandbox = HFStudent("sandbox:student")
    return counting | time_workloads(sandbox, sandbox_workloads(sandbox), repeats, counts=False)


def measure_two_threads(folder: Path, repeats: int) -> dict:
    """The first workload with whatever number of threads this process was given."""
    student = HFStudent(str(make_counter(folder / "10M", SIZES["10M"])))
    name, workload = next(iter(counting_workloads(student).items()))
    return time_workloads(student, {name: workload}, repeats, counts=True)


SECTIONS: dict[str, Callable[[Path, int], dict]] = {
    "generation": measure_generation,
    "two-threads": measure_two_threads,
    "sync": measure_sync,
    "teacher": measure_teacher,
    "steps": measure_steps,
    "ahead": measure_ahead,
}


def hardware() -> str:
    """Short name of the machine for file names."""
    return f"cpu-{os.cpu_count()}core"


def run_here(section: str, repeats: int, output: Path) -> None:
    """Measure one section in this process."""
    import vllm

    num_threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(num_threads)
    load_before, started = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rollout_throughput_") as folder:
        results = SECTIONS[section](Path(folder), repeats)
    facts = {
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "threads": num_threads,
        "seeds": list(range(repeats)),  # repeat i draws lengths, prompts and samples from seed i
        "models": {name: asdict(size) for name, size in SIZES.items()},
        "load_before": load_before,
        "seconds": time.perf_counter() - started,
    }
    output.write_text(json.dumps(facts | {"results": results}))


def main() -> None:
    """Run the sections one after the other, each in a new process, and write what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=[], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.output is not None:
        run_here(options.sections[0], options.repeats, options.output)
        return
    path = RESULTS / f"rollout_throughput_{hardware()}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"hardware": hardware(), "processor": processor(), "python": platform.python_version()}
    record["command"] = "python benchmarks/rollout_throughput.py"
    for section in options.sections or SECTIONS:
        print(f"--- {section}", flush=True)
        threads = {"OMP_NUM_THREADS": "2" if section == "two-threads" else "1"}
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, __file__, section, "--repeats", str(options.repeats), "--output", file.name]
            subprocess.run(command, env=os.environ | ENVIRONMENT | threads, check=True)
            record[section] = json.loads(Path(file.name).read_text())
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


def processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
