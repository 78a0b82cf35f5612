"""The parts of `gpu_suite.py`: each returns what it found, with a `summary`, or says why it must be left out."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_suite_loss import measure_loss
from throughput_models import Shape, Work, make_models, make_texts

TESTS = Path(__file__).parents[1] / "tests"
NUM_WARM_UP = 2
REAL = Work(
    151_936,
    Shape(1024, 28, 3072, heads=16, key_value_heads=8, head_dim=128),
    Shape(2048, 28, 6144, heads=16, key_value_heads=8, head_dim=128),
    num_rollouts=64,
    max_new_tokens=256,
    prompt_tokens=64,
)
TINY = Work(64, Shape(32, 1, 32), Shape(48, 1, 48), num_rollouts=2, max_new_tokens=4, prompt_tokens=4)
FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}


class LeftOut(Exception):
    """Why a part cannot run here."""


@dataclass(frozen=True)
class Place:
    """Where parts run.

    Attributes:
        is_tiny: On the CPU and tiny; otherwise on the GPU.
        folder: For models and runs; all parts share it.
    """

    is_tiny: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu" if self.is_tiny else "cuda")


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_tests(place: Place) -> dict[str, Any]:
    """The tests marked `gpu`."""
    if installed("pytest") is None:
        raise LeftOut("pytest is not installed: pip install .[dev]")
    if not TESTS.exists():
        raise LeftOut("there is no folder of tests beside the benchmarks; take a clone of the repository")
    files = sorted(str(path) for path in TESTS.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    how = ["--collect-only"] if place.is_tiny else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", *how, *files]
    ran = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    lines = (ran.stdout + ran.stderr).splitlines()
    if ran.returncode not in (0, 1):
        raise LeftOut(f"pytest could not run them: {' / '.join(lines[-5:])}")
    return {"summary": lines[-1], "exit_code": ran.returncode, "lines": lines[-200:]}


def run_loss(place: Place, precision: str) -> dict[str, Any]:
    """The loss at the sizes of real heads."""
    return measure_loss(place.device, precision, is_tiny=place.is_tiny)


def run_steps(place: Place, variant: str) -> dict[str, Any]:
    """Whole training steps, as `fit` takes them, and what `plan` says of them."""
    config = make_config(place, variant)
    ran = command_line("fit", config)
    if ran.returncode:
        raise LeftOut(f"fit ended with exit code {ran.returncode}: {last_lines(ran)}")
    (metrics,) = config.parent.rglob("metrics.csv")
    rows = read_steps(metrics)[0 if place.is_tiny else NUM_WARM_UP :]
    summary = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    peak = max((value for name, value in summary.items() if "/memory_gb/" in name), default=None)
    planned = ask_plan(config)
    summary |= {"peak_gb": peak, "planned_peak_gb": planned["peak_bytes"] / 1e9 if "peak_bytes" in planned else None}
    return {"summary": summary, "steps": rows, "config": config.read_text(), "plan": planned}


def make_config(place: Place, variant: str) -> Path:
    """Settings of a run in a folder of its own."""
    work = TINY if place.is_tiny else REAL
    folder = place.folder / variant.replace(" ", "_")
    folder.mkdir()
    dtype = None if place.is_tiny else torch.bfloat16  # as models are published; the student is trained in float32
    student, teacher = make_models(place.folder, work, dtype, place.device)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in make_texts(work)))
    of_student: dict[str, Any] = {"path": student}
    of_teacher: dict[str, Any] = {"path": teacher, "dtype": "float32" if place.is_tiny else "bfloat16"}
    if variant == "flash attention":
        need("flash-attn", place)
        of_student["attn_implementation"] = of_teacher["attn_implementation"] = "flash_attention_2"
    elif variant == "teacher offload":
        of_teacher["offload"] = True
    elif variant == "4-bit teacher":
        need("bitsandbytes", place)
        need("accelerate", place)
        of_teacher["quantization_config"] = FOUR_BITS
    config = {
        "seed_everything": 0,
        "model": {
            "student": {"class_path": "HFStudent", "init_args": of_student},
            "teacher": {"class_path": "HFTeacher", "init_args": of_teacher},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}},
            "measure_memory": True,
        },
        "data": {
            "task": {
                "class_path": "PromptTask",
                "init_args": {"train": {"path": str(prompts), "question": "prompt"}},
            },
            "sampling": {"max_new_tokens": work.max_new_tokens},
            "prompts_per_step": work.num_rollouts,
        },
        "trainer": {
            "accelerator": "cpu" if place.is_tiny else "gpu",
            "devices": 1,
            "precision": "32-true" if place.is_tiny else "bf16-mixed",
            "max_steps": 2 if place.is_tiny else NUM_WARM_UP + 4,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "default_root_dir": str(folder / "run"),
        },
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def need(package: str, place: Place) -> None:
    """Leave the part out where something is missing."""
    if place.is_tiny:
        raise LeftOut("it needs a GPU")
    if installed(package) is None:
        raise LeftOut(f"{package} is not installed: pip install {package}")


def read_steps(metrics: Path) -> list[dict[str, float]]:
    """Seconds, speeds and memory of every step."""
    wanted = ("train/seconds/", "train/memory_gb/", "train/tokens_per_second")
    with metrics.open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("train/seconds/student")]
    return [{name: float(v) for name, v in row.items() if name.startswith(wanted) and v} for row in rows]


def ask_plan(config: Path) -> dict[str, Any]:
    """What `opd-lightning plan` says of a run."""
    out = config.parent / "plan.json"
    ran = command_line("plan", config, "--json", str(out))
    if ran.returncode or not out.exists():
        return {"left_out": f"`opd-lightning plan` gave nothing: {last_lines(ran)}"}
    return json.loads(out.read_text())


def command_line(command: str, config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`opd-lightning COMMAND --config FILE`."""
    words = [sys.executable, "-m", "opd_lightning", command, "--config", str(config), *options]
    return subprocess.run(words, cwd=config.parent, capture_output=True, text=True)


def last_lines(ran: subprocess.CompletedProcess[str]) -> str:
    """The end of what a command said."""
    return " / ".join((ran.stdout + ran.stderr).strip().splitlines()[-3:])


VARIANTS = ("bf16-mixed", "flash attention", "teacher offload", "4-bit teacher")
PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {  # what is wanted most comes first: time may run out
    "loss, bfloat16": partial(run_loss, precision="bfloat16"),
    "tests": run_tests,
    **{f"steps, {variant}": partial(run_steps, variant=variant) for variant in VARIANTS},
    "loss, float32": partial(run_loss, precision="float32"),
}
