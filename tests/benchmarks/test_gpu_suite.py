import json
import subprocess
import sys
from pathlib import Path

import gpu_suite
import gpu_suite_loss
import pytest
import torch
from gpu_suite_parts import PARTS, Place

BENCHMARKS = Path(gpu_suite.__file__).parent


def test_without_a_gpu_it_gives_no_results(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_suite.main([])
    assert "no CUDA device is there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_suite.main(["--tiny"])
    assert "sizes this small are no results" in capsys.readouterr().err


def test_the_loss_is_measured_and_exact():
    found = gpu_suite_loss.measure_loss(torch.device("cpu"), "float32", is_tiny=True)
    summary = found["summary"]["tiny"]
    errors = [value for name, value in summary.items() if name.startswith("error")]
    assert len(errors) == 3 and max(errors) < 1e-4
    assert summary["four products, times the products"] == 1 < summary["reverse KL, all metrics, times the products"]
    bfloat16 = gpu_suite_loss.measure_loss(torch.device("cpu"), "bfloat16", is_tiny=True)["summary"]["tiny"]
    assert 1e-4 < bfloat16["error of losses"] < 0.1


def test_a_part_that_has_no_time_or_breaks_is_left_out_with_the_reason(tmp_path, monkeypatch):
    assert "give more --minutes" in gpu_suite.run_part("tests", True, tmp_path, 0)["left_out"]
    monkeypatch.setattr(gpu_suite, "__file__", str(tmp_path / "missing.py"))
    broken = gpu_suite.run_part("tests", True, tmp_path, 60)
    assert "exit code 2" in broken["left_out"] and "missing.py" in broken["last_lines"][-1]


@pytest.mark.slow
def test_the_whole_suite_at_tiny_sizes(tmp_path, monkeypatch):
    out = tmp_path / "tiny.json"
    wanted = ["loss, float32", "steps, bf16-mixed", "steps, flash attention"]
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--tiny", "--minutes", "5", "--out", str(out)]
    subprocess.run(command + [word for name in wanted for word in ("--only", name)], check=True)
    result = json.loads(out.read_text())
    assert result["machine"]["is_tiny"] and list(result["parts"]) == wanted
    steps = result["parts"]["steps, bf16-mixed"]
    assert len(steps["steps"]) == 2 and steps["summary"]["train/seconds/student"] > 0
    assert steps["summary"]["peak_gb"] > 0.05 and steps["plan"]
    assert result["parts"]["steps, flash attention"]["left_out"] == "it needs a GPU"


def test_tests_for_the_gpu_are_there():
    tests = BENCHMARKS.parent / "tests"
    assert "pytest.mark.gpu" in (tests / "training" / "test_on_a_gpu.py").read_text()
    assert "tests" in PARTS and Place(True, tests).device.type == "cpu"
