"""This machine as `Hardware`: what it has, asked of it, and what it does in a second, measured in a few."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from opd_lightning.backends.hf import HFStudent
from opd_lightning.backends.hf.anatomy import body_states
from opd_lightning.backends.hf.loading import load_config
from opd_lightning.backends.hf.weightless import blank_model, without_data
from opd_lightning.planning.counting import OperationCounter
from opd_lightning.planning.hardware import HARDWARE, Hardware

THIS_MACHINE = "this-machine"
_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = (  # limit, use and statistics of the processes that this one is counted with, in both versions of cgroups
    tuple(_CGROUP / f"memory.{name}" for name in ("max", "current", "stat")),
    tuple(_CGROUP / "memory" / f"memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
)
_PHYSICAL = Path("/proc/meminfo")
_TURNS = 5
_ROWS = (1, 4, 16, 64, 256, 1024)  # of products, from those of a token of a few answers to those of a micro-batch
_WIDTH = 512
_WEIGHTS = 2**24  # that products take turns with: more than a core's cache holds
_SIZES = (2**14, 2**16, 2**18, 2**20, 2**21, 2**22, 2**23, 2**24)  # entries: from the cache of a core to its memory


def memory_of(device: torch.device) -> float | None:
    """Gigabytes that a device has for this process; None where nobody says."""
    if device.type == "cuda":
        return 1e-9 * torch.cuda.get_device_properties(device).total_memory
    limits = [int(text) for path, *_ in _GROUPS if (text := _read(path)).isdigit()]
    found = [line.split() for line in _read(_PHYSICAL).splitlines() if line.startswith("MemTotal:")]
    limits += [1024 * int(words[1]) for words in found]
    return 1e-9 * min(limits) if limits else None


def free_memory_of(device: torch.device) -> float | None:
    """Gigabytes of a device that nobody has taken; None where nobody says."""
    if device.type == "cuda":
        return 1e-9 * torch.cuda.mem_get_info(device)[0]
    found = [line.split() for line in _read(_PHYSICAL).splitlines() if line.startswith("MemAvailable:")]
    free = [1024 * int(words[1]) for words in found]
    for limit, used, counted in _GROUPS:
        if (most := _read(limit)).isdigit() and (now := _read(used)).isdigit():
            lines = dict(line.split() for line in _read(counted).splitlines())
            remembered = int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))  # files, given back
            free.append(max(0, int(most) - int(now) + remembered))
    return 1e-9 * min(free) if free else None


def this_machine() -> Hardware:
    """The first GPU where there is one, else this processor with the threads that torch has now.

    Raises:
        ValueError: It does not say how much memory it has.
    """
    if torch.cuda.is_available():
        return _this_gpu()
    memory_gb = memory_of(torch.device("cpu"))
    if memory_gb is None:
        raise ValueError("hardware: this machine does not say how much memory it has. Set --memory_gb.")
    bandwidths = [(1e-6 * 3 * 4 * size, _bandwidth_gb_s(size)) for size in _SIZES]
    product_seconds = [(rows, _seconds_per_weight(rows)) for rows in _ROWS]
    machine = Hardware(
        name=THIS_MACHINE,
        memory_gb=memory_gb,
        tflops=1e-12 * 2 * _ROWS[-1] / _seconds_per_weight(_ROWS[-1], torch.bfloat16),
        bandwidth_gb_s=_bandwidth_gb_s(_SIZES[-1], is_new=False),
        float32_tflops=1e-12 * 2 * product_seconds[-1][0] / product_seconds[-1][1],
        source=f"measured here, {torch.get_num_threads()} thread(s)",
        is_gpu=False,
        attention_tflops=_attention_tflops(),
        product_seconds=product_seconds,
        bandwidths=bandwidths,
        giga_entries_s=_giga_entries_s(),
        call_us=_call_us(),
    )
    return replace(machine, factor=_factor(machine))


def _this_gpu() -> Hardware:
    properties = torch.cuda.get_device_properties(0)
    kinds = [each for each in HARDWARE.values() if each.name.partition("-")[0] in properties.name]
    if not kinds:
        raise ValueError(
            f"hardware: nothing is known here of {properties.name!r}. Set --memory_gb, --tflops and --bandwidth_gb_s."
        )
    memory_gb = 1e-9 * properties.total_memory
    return min(kinds, key=lambda each: abs(each.memory_gb - memory_gb))


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def _seconds(work: Callable[[], object]) -> float:
    """Processor time, in the median turn; all threads' together, divided by their number."""
    work()
    turns = []
    for _ in range(_TURNS):
        started = time.process_time()
        work()
        turns.append(time.process_time() - started)
    return float(statistics.median(turns)) / torch.get_num_threads()


def _seconds_per_weight(num_rows: int, dtype: torch.dtype = torch.float32) -> float:
    """What a product of so many rows takes, for each weight."""
    times = max(2, _WEIGHTS // _WIDTH**2 // max(1, num_rows // 64))  # with many rows the weights are no matter
    left, weights = torch.ones(num_rows, _WIDTH, dtype=dtype), torch.ones(times, _WIDTH, _WIDTH, dtype=dtype)

    def work() -> None:
        for weight in weights:
            torch.nn.functional.linear(left, weight)

    return _seconds(work) / weights.numel()


def _attention_tflops(rows: int = 8, heads: int = 6, length: int = 128, size: int = 64) -> float:
    states = torch.ones(rows, heads, length, size)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
    flops = 4 * rows * heads * length * length * size
    attend = torch.nn.functional.scaled_dot_product_attention
    return 1e-12 * flops / _seconds(lambda: attend(states, states, states, attn_mask=mask))


def _bandwidth_gb_s(num_entries: int, *, is_new: bool = True) -> float:
    """Of a sum of two tensors, in memory that the system gives for it, as a step's results are, or that is there."""
    left, right = torch.ones(num_entries), torch.ones(num_entries)
    out = None if is_new else torch.empty(num_entries)
    times = max(1, 2**22 // num_entries)

    def work() -> None:
        for _ in range(times):
            torch.add(left, right, out=out)

    return 1e-9 * 3 * 4 * num_entries * times / _seconds(work)


def _giga_entries_s(num_entries: int = 2**16, times: int = 16) -> float:
    given = torch.ones(num_entries)

    def work() -> None:
        for _ in range(times):
            torch.nn.functional.silu(given)

    return 1e-9 * num_entries * times / _seconds(work)


def _call_us() -> float:
    """What an operation takes that has next to nothing to do, with what Python and autograd do for it."""
    student = HFStudent("sandbox:student")
    with without_data(), OperationCounter(lambda operation: 0.0) as counter:
        model = student.load()
        counter.restart()
        _pass(model)
        num_calls = counter.num_calls
    model = student.load()
    return float(1e6 * _seconds(lambda: _pass(model)) / num_calls)


def _factor(machine: Hardware, num_tokens: int = 512) -> float:
    """Two layers of ordinary shape forth and back, against the sum of their operations."""
    config = load_config(HFStudent("sandbox:student").source)
    sizes = {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 6, "num_key_value_heads": 3}
    for name, value in (
        sizes | {"head_dim": 64, "num_hidden_layers": 2, "layer_types": config.layer_types[:2]}
    ).items():
        setattr(config, name, value)
    with without_data(), OperationCounter(machine.seconds) as counter:
        model = blank_model(config, torch.float32, None)
        counter.restart()
        _pass(model, 8, num_tokens // 8)
        planned = counter.seconds
    model = blank_model(config, torch.float32, None)
    return float(_seconds(lambda: _pass(model, 8, num_tokens // 8)) / planned)


def _pass(model: torch.nn.Module, rows: int = 1, length: int = 4) -> None:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).expand(rows, length)
    states: Tensor = body_states(model, ids, torch.ones_like(ids), positions)
    states.sum().backward()  # type: ignore[no-untyped-call]
