"""Hardware in numbers."""

from dataclasses import replace

import pytest
import torch

from opd_lightning.planning import HARDWARE, Hardware, machine
from opd_lightning.planning.hardware import Operation

CPU = Hardware("c", 16, 0.1, 10, 0.2, "test", is_gpu=False, giga_entries_s=1, call_us=10, factor=1.5)


def test_a_gpu_takes_the_longest_of_call_products_and_bytes():
    gpu = HARDWARE["H100"]
    assert gpu.seconds(Operation()) == 8e-6
    assert gpu.seconds(Operation(bytes=3.35e12)) == pytest.approx(1.0)
    assert gpu.seconds(Operation(flops=989e12, bytes=1, rows=8, is_low=True)) == pytest.approx(1 / 0.6)
    assert gpu.seconds(Operation(flops=67e12, rows=8)) == pytest.approx(1 / 0.6)


def test_on_a_processor_they_add_up():
    assert CPU.seconds(Operation()) == pytest.approx(1.5 * 1e-5)
    assert CPU.seconds(Operation(flops=0.2e12, rows=10, bytes=10e9)) == pytest.approx(1.5 * (1e-5 + 1 + 1))
    assert CPU.seconds(Operation(entries=1e9)) == pytest.approx(1.5 * (1e-5 + 1))


@pytest.mark.parametrize(("rows", "seconds"), [(1, 2e-9), (4, 3.5e-9), (11, 7e-9), (111, 57e-9)])
def test_products_of_few_rows_take_what_was_measured_for_each_weight(rows, seconds):
    measured = replace(
        CPU, float32_tflops=1e-12 * 2 * 101 / 52e-9, product_seconds=((1, 2e-9), (11, 7e-9), (101, 52e-9))
    )
    num_weights = 10**6
    operation = Operation(flops=2 * rows * num_weights, rows=rows, bytes=4 * num_weights)
    assert measured.seconds(operation) == pytest.approx(1.5 * (1e-5 + seconds * num_weights))


def test_bandwidths_are_between_those_measured():
    machine = Hardware("c", 16, 1, 5, 1, "test", is_gpu=False, bandwidths=((1, 64), (100, 16)), call_us=0)
    assert machine.seconds(Operation(bytes=64e3)) == pytest.approx(1e-6)
    assert machine.seconds(Operation(bytes=10e6)) == pytest.approx(10e6 / 32e9)
    assert machine.seconds(Operation(bytes=16e9)) == pytest.approx(1.0)
    assert machine.seconds(Operation(bytes=5e9, flops=1, rows=1)) == pytest.approx(1.0)  # of weights: from memory


def test_every_entry_of_the_table_is_whole():
    for name, each in HARDWARE.items():
        assert name == each.name and each.source.startswith("NVIDIA") and each.is_gpu
        assert each.tflops > each.float32_tflops > 0 and each.memory_gb > 0 and each.bandwidth_gb_s > 0


def test_files_that_the_system_remembers_are_free_memory(tmp_path, monkeypatch):
    """A group's usage counts what was read from disk; it is given back when somebody needs the room."""
    for name, text in {
        "memory.max": "8000",
        "memory.current": "7500",
        "memory.stat": "anon 500\ninactive_file 6000",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_GROUPS", ((*(tmp_path / f"memory.{end}" for end in ("max", "current", "stat")),),))
    assert machine.free_memory_of(torch.device("cpu")) == pytest.approx(1e-9 * 6500)
