"""Teachers in 8 and 4 bits: what they say beside the same one in full, and what is said where that does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from scoring import CPU, EVERYTHING, make_batches
from torch import nn

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.backends.hf.teacher_memory import whole_bytes
from opd_lightning.commands import cli
from opd_lightning.commands.whole_teacher import load_whole_teacher
from opd_lightning.diagnosis.pair import Pair

BITS = {
    8: {"quant_method": "bitsandbytes", "load_in_8bit": True},
    4: {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.mark.slow
def test_fewer_bits_say_nearly_the_same():
    pytest.importorskip("bitsandbytes")
    student = HFStudent("sandbox:student")  # blocks of 64 weights: the other test models are smaller
    (batch,), _ = make_batches()
    full, errors = {}, {}
    for bits in (32, 8, 4):
        teacher = HFTeacher("sandbox:teacher", quantization_config=BITS.get(bits), packing=False)
        teacher.setup(student, nn.Identity(), CPU)
        if bits != 32:
            layer = teacher._model.get_decoder().layers[0].mlp.up_proj.weight
            assert layer.dtype == {8: torch.int8, 4: torch.uint8}[bits]
        full[bits] = teacher.score(batch, EVERYTHING).full()
        errors[bits] = float((full[32].exp() * (full[32] - full[bits])).sum(-1).mean())
    assert errors[32] == 0 < errors[8] < errors[4] < 0.5
    again = teacher.in_full()
    assert teacher.quantization_config == BITS[4] and again.quantization_config is None
    again.setup(student, nn.Identity(), CPU)
    assert torch.equal(again.score(batch, EVERYTHING).full(), full[32])
    assert whole_bytes(again) == again._model.get_memory_footprint()


def test_a_teacher_that_does_not_fit_in_full_is_not_loaded(monkeypatch):
    monkeypatch.setattr("opd_lightning.commands.whole_teacher.free_memory_of", lambda device: 0.001)
    teacher = HFTeacher("sandbox:teacher", quantization_config=BITS[4])
    named = ("objective", "task", "engine", "teacher_engine", "sampling", "seed", "max_tokens")
    student = HFStudent("sandbox:student")
    pair = Pair(student=student, teacher=teacher, model=nn.Identity(), **dict.fromkeys(named))
    assert load_whole_teacher(pair) == (
        "What quantisation changes of the teacher: in full it takes 0.0025 GB, and 0.001 GB are free on cpu. Measure it"
        " on a machine that has the memory."
    )
    free = {"cpu": 0.001, "meta": 100.0}  # room on the device is not enough: weights are read by way of the CPU
    monkeypatch.setattr("opd_lightning.commands.whole_teacher.free_memory_of", lambda device: free[device.type])
    elsewhere = replace(pair, device=torch.device("meta"))
    assert ", and 0.001 GB are free on cpu." in load_whole_teacher(elsewhere)


@pytest.mark.slow
def test_a_diagnosis_says_what_quantisation_changes(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    teacher = {"class_path": "HFTeacher", "init_args": {"path": "sandbox:teacher", "quantization_config": BITS[4]}}
    config = {
        "model": {"student": {"class_path": "HFStudent", "init_args": {"path": "sandbox:student"}}, "teacher": teacher},
        "data": {"task": {"class_path": "ArithmeticTask"}, "sampling": {"max_new_tokens": 8}},
        "trainer": {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    small = ("--num_prompts", "3", "--num_samples", "1", "--gradient_rollouts", "1")
    cli.main(["diagnose", "--config", str(tmp_path / "run.yaml"), *small])
    written = json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())
    shown = " ".join(capsys.readouterr().out.split())
    found = written["quantization"]
    assert found["num_tokens"] == written["num_tokens"] and found["kl"]["num_prompts"] == 3
    assert 1e-6 < found["kl"]["value"] < 0.1 and found["largest"] >= found["kl"]["value"] and found["agreement"] > 0.8
    assert "KL of the teacher in full to the" in shown
