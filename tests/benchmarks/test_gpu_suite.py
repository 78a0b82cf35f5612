import json
from pathlib import Path

import gpu_suite
import gpu_suite_loss
import gpu_suite_parts
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
def test_steps_at_tiny_sizes(tmp_path, monkeypatch, forks):
    def command_line(command, config, *options):
        return forks.run("opd-lightning", command, "--config", str(config), *options, cwd=config.parent)

    monkeypatch.setattr(gpu_suite_parts, "command_line", command_line)

    def found(part):
        out = tmp_path / "found.json"
        gpu_suite.main(["--tiny", "--part", part, "--folder", str(tmp_path), "--out", str(out)])
        return json.loads(out.read_text())

    steps = found("steps, bf16-mixed")
    assert len(steps["steps"]) == 2 and steps["summary"]["train/seconds/student"] > 0
    assert steps["summary"]["peak_gb"] > 0.05 and steps["summary"]["planned_peak_gb"] > 0
    assert found("steps, flash attention") == {"left_out": "it needs a GPU"}


def test_tests_for_the_gpu_are_there():
    tests = BENCHMARKS.parent / "tests"
    assert "pytest.mark.gpu" in (tests / "training" / "test_on_a_gpu.py").read_text()
    assert "tests" in PARTS and Place(True, tests).device.type == "cpu"
