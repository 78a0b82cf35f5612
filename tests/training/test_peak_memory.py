import gc
import sys

import pytest
import torch
from toys import make_data, make_module, make_trainer

from opd_lightning.training import peak_memory
from opd_lightning.training.peak_memory import PeakMemory
from opd_lightning.training.stopwatch import Stopwatch

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is known on Linux")
CPU = torch.device("cpu")
MEGABYTES = 128


def hold():
    torch.ones(MEGABYTES * 2**18)  # touched, and given back at once: so large a block is no longer the process's
    gc.collect()


@linux
def test_a_part_that_holds_more_for_a_moment_has_the_higher_peak():
    watch = Stopwatch(CPU, measures_memory=True)
    watch.restart()
    with watch("small"):
        pass
    with watch("large"):
        hold()
    with watch("small again"):
        pass
    peaks = watch.memory_gb
    assert list(peaks) == ["between_steps", "small", "large", "small again"]
    extra = MEGABYTES * 2**20 / 1e9
    assert peaks["large"] - peaks["small"] == pytest.approx(extra, rel=0.05)
    assert peaks["large"] - peaks["small again"] == pytest.approx(extra, rel=0.05)


@linux
def test_what_came_before_the_first_part_is_told_apart():
    watch = Stopwatch(CPU, measures_memory=True)
    hold()
    watch.restart()
    with watch("student"):
        pass
    assert watch.memory_gb["between_steps"] - watch.memory_gb["student"] == pytest.approx(
        MEGABYTES * 2**20 / 1e9, rel=0.05
    )


def test_where_it_cannot_be_known_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_RESET", tmp_path / "no" / "clear_refs")
    with pytest.raises(ValueError, match=r"model\.measure_memory: .* known on Linux only .* Leave it out"):
        PeakMemory(CPU)


@linux
@pytest.mark.parametrize("measure", [True, False])
def test_a_run_logs_it_when_asked(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, measure):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, measure_memory=measure)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "memory_gb" in name}
    parts = {"between_steps", "teacher", "student", "optimizer"} if measure else set()
    assert set(logged) == {f"train/memory_gb/{part}" for part in parts}
    assert all(0.05 < value < 100 for value in logged.values())


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_torch_allocated():
    device = torch.device("cuda")
    watch = Stopwatch(device, measures_memory=True)
    with watch("large"):
        torch.ones(MEGABYTES * 2**18, device=device)
    with watch("small"):
        pass
    assert watch.memory_gb["large"] - watch.memory_gb["small"] == pytest.approx(MEGABYTES * 2**20 / 1e9, rel=0.01)
