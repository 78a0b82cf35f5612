"""What the loss costs, against the four matrix products that no exact loss over a vocabulary can do without.

The floor: logits of student and teacher, and from the logits' gradient that of hidden states and head, in chunks, into
memory that is used again. Beside it, in turn: `compare_in_chunks` with all metrics and without, what it was before
(chunks recomputed by checkpointing), and the chunked losses of TRL and Liger where they are installed. Times are
processor time, and ratios are taken turn by turn before their median: the machine may be busy with other things. Peaks
of memory are of one fresh process each, above what weights and hidden states take; with narrow models, because they are
about matrices of tokens by vocabulary.

    pip install --no-deps --target /tmp/peers trl==1.16.0 liger-kernel==0.8.5 triton    # optional
    PYTHONPATH=/tmp/peers python benchmarks/loss_floor.py     # result in benchmarks/results/loss_floor_<hardware>.json
    PYTHONPATH=/tmp/peers python benchmarks/loss_floor.py --peaks
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from loss_floor_peers import checkpointed, liger_loss, trl_loss
from torch import Tensor

from opd_lightning.interfaces import LinearHead, Objective, ResponseTokens, ScoreRequest
from opd_lightning.objectives import (
    DivergenceObjective,
    HiddenScores,
    JensenShannon,
    SampledTokenObjective,
    StudentTopK,
    compare_in_chunks,
)

RESULTS = Path(__file__).parent / "results"
PEAK_TOKENS = (512, 2048, 8192)
PEAKS = "peak MiB, V 151,936, widths 64 and 160, 512, 2,048 and 8,192 tokens"
FULL = ScoreRequest(full_vocabulary=True)


@dataclass(frozen=True)
class Case:
    """Sizes: V, both widths, N tokens, n tokens a chunk."""

    vocabulary: int
    student: int
    teacher: int
    num_tokens: int
    chunk: int


CASES = {
    "V 32,000": Case(32_000, 256, 384, 2048, 256),
    "V 151,936": Case(151_936, 1024, 2560, 512, 256),
    "peaks": Case(151_936, 64, 160, 512, 256),
    "small": Case(2_000, 16, 24, 64, 16),
}


class Material:
    """Hidden states and heads of a student and a teacher, and the tokens."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=generator)

        self.hidden = normal(case.num_tokens, case.student).requires_grad_()
        self.weight = normal(case.vocabulary, case.student, scale=3 / case.student**0.5).requires_grad_()
        self.teacher_hidden = normal(case.num_tokens, case.teacher)
        self.teacher_weight = normal(case.vocabulary, case.teacher, scale=3 / case.teacher**0.5)
        ids = torch.randint(case.vocabulary, (case.num_tokens,), generator=generator)
        self.tokens = ResponseTokens(ids, normal(case.num_tokens) - 8, torch.arange(case.num_tokens))
        self.head = LinearHead(self.weight, None, case.vocabulary)
        self.scores = HiddenScores(self.teacher_hidden, ids, LinearHead(self.teacher_weight, None, case.vocabulary))

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def products(m: Material) -> None:
    """The floor."""
    hidden, weight, n = m.hidden.detach(), m.weight.detach(), m.case.chunk
    logits, teacher = torch.empty(n, m.case.vocabulary), torch.empty(n, m.case.vocabulary)
    of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), n):
        rows = slice(start, start + n)
        torch.mm(hidden[rows], weight.T, out=logits)
        torch.mm(m.teacher_hidden[rows], m.teacher_weight.T, out=teacher)
        of_hidden[rows] = logits @ weight
        of_weight.addmm_(logits.T, hidden[rows])


def ours(m: Material, objective: Objective, facts_k: int) -> None:
    """`compare_in_chunks`, and the backward pass of the mean."""
    asked = FULL if facts_k else None
    compared = compare_in_chunks(m.hidden, m.head, objective, m.scores, m.tokens, asked=asked, facts_k=facts_k)
    compared.losses.mean().backward()


def before(m: Material, objective: Objective, facts_k: int) -> None:
    """The same as it was until the loss was done in one pass."""
    losses, _ = checkpointed(m.hidden, m.head, objective, m.scores, m.tokens, FULL if facts_k else None, facts_k)
    losses.mean().backward()


def arms(m: Material) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    n = m.case.chunk
    reverse, jensen = (
        DivergenceObjective(chunk_tokens=n),
        DivergenceObjective(divergence=JensenShannon(), chunk_tokens=n),
    )
    given: dict[str, Callable[[], object]] = {
        "four products": lambda: products(m),
        "reverse KL, all metrics": lambda: ours(m, reverse, 16),
        "reverse KL": lambda: ours(m, reverse, 0),
        "JSD(0.5), all metrics": lambda: ours(m, jensen, 16),
        "JSD(0.5)": lambda: ours(m, jensen, 0),
        "student top-16, all metrics": lambda: ours(m, DivergenceObjective(StudentTopK(), chunk_tokens=n), 16),
        "sampled token, all metrics": lambda: ours(m, SampledTokenObjective(chunk_tokens=n), 16),
        "before: reverse KL, all metrics": lambda: before(m, reverse, 16),
        "before: reverse KL": lambda: before(m, reverse, 0),
        "before: JSD(0.5)": lambda: before(m, jensen, 0),
    }
    if installed("trl"):
        given["TRL: reverse KL, student entropy"] = lambda: trl_loss(m, beta=1.0)
        given["TRL: JSD(0.5), student entropy"] = lambda: trl_loss(m, beta=0.5)
    if installed("liger-kernel"):
        given["Liger: reverse KL"] = lambda: liger_loss(m, beta=1.0)
        given["Liger: JSD(0.5)"] = lambda: liger_loss(m, beta=0.5)
    return given


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(case: Case, repeats: int, only: list[str]) -> dict[str, list[float]]:
    """Processor seconds of every arm, `repeats` turns."""
    material = Material(case)
    works = {name: work for name, work in arms(material).items() if name in only}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            material.forget()
            start = time.process_time()
            work()
            if turn:  # the first warms up
                seconds[name].append(round(time.process_time() - start, 4))
    return seconds


def peak(case: Case, name: str) -> float:
    """MiB that one run of an arm takes at most, above what was there before; call it in a fresh process."""
    material = Material(case)
    work = arms(material)[name]  # peers are imported at their first call, the rest is there
    small = Material(CASES["small"])
    arms(small)[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    there = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    work()
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024 - there, 1)


def peaks(name: str, num_tokens: int) -> float:
    """Peak of an arm at so many tokens, in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, "--tokens", str(num_tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, print the table, add the raw values to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--only", action="append", default=[], help="arms beside the four products")
    parser.add_argument("--out", type=Path, default=RESULTS / "loss_floor_cpu-2core.json")
    parser.add_argument("--peaks", action="store_true", help="measure memory instead of time")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=512, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(json.dumps(peak(replace(CASES["peaks"], num_tokens=arguments.tokens), arguments.peak)))
        return
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores shared with other work, 1 thread"
    result["versions"] = {name: installed(name) for name in ("torch", "trl", "liger-kernel")}
    names = ["four products", *(arguments.only or list(arms(Material(CASES["small"])))[1:])]
    if arguments.peaks:
        result[PEAKS] = found = {}
        for name in names:
            found[name] = [peaks(name, num_tokens) for num_tokens in PEAK_TOKENS]
            print(name, found[name], flush=True)
    for case_name in [] if arguments.peaks else arguments.case or ["V 32,000", "V 151,936"]:
        result[f"seconds, {case_name}"] = seconds = measure(CASES[case_name], arguments.repeats, names)
        for name, values in seconds.items():
            ratios = [value / least for value, least in zip(values, seconds["four products"], strict=True)]
            print(f"{case_name}: {name}: {statistics.median(ratios):.2f} x of {sorted(ratios)}", flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
