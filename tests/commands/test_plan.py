"""`opd-lightning plan`: what is shown and written, and mistakes in one line."""

import json
from dataclasses import replace

import pytest
import yaml

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.commands import cli
from opd_lightning.commands.plan import _number, find_hardware
from opd_lightning.commands.plan_report import make_report, one_line
from opd_lightning.commands.planned_case import _planned_teacher
from opd_lightning.planning import HARDWARE, Budget, Case, Phase, Rehearsal, TeacherElsewhere
from opd_lightning.planning.budget import WHOLE, Layout, budget
from opd_lightning.planning.case import SharedTeacher
from opd_lightning.planning.remedies import _changes
from opd_lightning.teachers import MixtureTeacher

CONFIG = {  # of a model that nobody could load here
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    settings = {
        "model": {
            "student": {"class_path": "HFStudent", "init_args": {"path": str(folder)}},
            "teacher": {"class_path": "HFTeacher", "init_args": {"path": str(folder)}},
        },
        "data": {"task": {"class_path": "ArithmeticTask"}, "sampling": {"max_new_tokens": 200}, "prompts_per_step": 8},
        "trainer": {"accelerator": "gpu", "devices": 4, "precision": "bf16-mixed", "default_root_dir": str(tmp_path)},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.slow
def test_a_plan_needs_neither_weights_nor_tokenizer_nor_gpu(config, tmp_path, capsys):
    words = ["plan", "--config", config, "--prompt_tokens", "100", "--memory_gb", "4", "--tflops", "100"]
    cli.main([*words, "--bandwidth_gb_s", "1000", "--devices", "1", "--json", str(tmp_path / "plan.json")])
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path) not in line)
    assert "of 4 GB at the peak" in shown and "It does not fit" in shown
    assert "student.lora: {r: 16}" in shown and "teacher.offload: true" in shown
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["trained_bytes"] > 4 * 151_936 * 1024
    assert not written["fits"] and written["layout"]["num_devices"] == 1
    assert {phase["name"] for phase in written["phases"]} == {"generate", "teacher", "student", "optimizer"}


def test_a_folder_without_tokenizer_needs_the_length_of_prompts(config, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--config", config, "--hardware", "H100"])
    assert ended.value.code == 2
    assert "prompt_tokens: " in (said := capsys.readouterr().err) and "Set --prompt_tokens" in said


def test_a_model_that_is_not_here_is_one_line(config, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it reads the variable when it is imported
    words = ["--model.student.init_args.path", "nobody/nothing", "--hardware", "H100", "--prompt_tokens", "9"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--config", config, *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "student.path: cannot load the configuration of 'nobody/nothing'" in said and "give a local folder" in said


def test_devices_are_counted_as_lightning_counts_them():
    named = {"0,1": 2, "1,": 1, "3": 3, 4: 4, "auto": 1, "-1": 1, -1: 1}
    assert {devices: _number(devices) for devices in named} == named
    assert _number([0, 2, 3]) == 3


def test_hardware_has_a_name_or_three_numbers():
    assert find_hardware("L40S") is HARDWARE["L40S"]
    assert find_hardware(None, 10, 80, 500).float32_tflops == 10
    with pytest.raises(ValueError, match=r"^hardware: there is no H10 here. Did you mean H100\? Expected one of B200"):
        find_hardware("H10")
    with pytest.raises(ValueError, match=r"^tflops: hardware is described by all of .* Set --tflops too"):
        find_hardware(None, 10)
    with pytest.raises(ValueError, match=r"^hardware: H100 has its own .* Leave either it or them out"):
        find_hardware("H100", 10)


def phase(name, **peak):
    return Phase(name, {part.replace("_", " "): size for part, size in peak.items()}, 1.0, 0, 0, 1)


class Objective:
    chunk_tokens = 10


class Student:
    class tokenizer:
        vocab_size = 100


def test_shares_and_engines_of_a_device():
    case = Case(Student(), None, Objective(), None, None, 1, 1, 1, engine_rows=0)
    phases = [
        phase("student", student_weights=800, teacher_weights=50, activations=7),
        phase("optimizer", gradients=80),
    ]
    found = Rehearsal(
        phases, trained_bytes=800, gathered_bytes=30, gathered_gradient_bytes=20, resting_bytes=5, scores_bytes=3
    )
    alone = budget(case, found, Layout(is_gpu=False), 1.0)
    assert alone.phases[1:] == phases[1:] and alone.worst is alone.phases[0] and alone.fits
    shared = budget(case, found, Layout(False, num_devices=8, is_sharded=True), 1.0)
    assert shared.phases[0].peak == {
        "student weights": 100,
        "gathered weights": 30,
        "teacher weights": 50,
        "activations": 7,
        "gradients": 20,
        "teacher scores": 3,
    }
    assert shared.phases[1].peak == {"gradients": 10} and shared.phases[1].seconds == 1 / 8
    gpu = budget(case, found, Layout(True, engine_awake_gb=0.4), 1.0)
    assert [each.name for each in gpu.phases] == ["generate", "student", "optimizer"]
    assert gpu.phases[0].peak["engine"] == 4e8 and "engine" not in gpu.phases[1].peak
    assert gpu.phases[1].peak["teacher weights"] == 5 and gpu.phases[1].peak["loss"] == 4 * 8 * 10 * 100
    assert gpu.phases[2].peak["activations"] == 800  # the copy of all weights that torch steps over
    fused = budget(case, replace(found, is_fused=True), Layout(True, engine_awake_gb=0.4), 1.0)
    assert "activations" not in fused.phases[2].peak
    copies = {"EffOPD's copies": 7}
    found = Rehearsal([Phase("generate", copies, 1.0, 0, 0, 1)], trained_bytes=7, gathered_bytes=0)
    assert budget(case, found, Layout(False), 1.0).worst == Phase("search", {"EffOPD's copies": 14}, 0.0, 0, 0, 0)
    assert not Budget([phase("student", activations=int(0.96e9))], 1.0).fits


def test_what_is_whole_on_a_device_that_has_a_share():
    """An engine that runs the student has it whole; a teacher is cut up but for its head, and for what it runs."""
    case = Case(None, None, None, None, None, 1, 1, 1, engine_rows=4)
    weights = {"student_weights": 800, "teacher_weights": 58, "gradients": 80}
    phases = [phase(name, **weights) for name in ("generate", "teacher", "student", "optimizer")]
    found = Rehearsal(
        phases,
        trained_bytes=80,
        gathered_bytes=30,
        gathered_gradient_bytes=6,
        shared_teacher=SharedTeacher(body_bytes=48, gathered_bytes=12, head_bytes=10),
        scores_bytes=5,
    )
    shared = budget(case, found, Layout(False, num_devices=8, is_sharded=True), 1.0)
    held = {"student weights": 100, WHOLE: 800, "teacher weights": 6 + 10, "gradients": 10}
    assert [each.peak for each in shared.phases] == [
        held,
        held | {"gathered weights": 12, "teacher scores": 5},
        held | {"gathered weights": 30, "gradients": 16, "teacher scores": 5},
        held,
    ]
    apart = budget(replace(case, engine_rows=0), found, Layout(False, num_devices=8, is_sharded=True), 1.0)
    assert not any(WHOLE in each.peak for each in apart.phases)
    for layout in (Layout(False, num_devices=8), Layout(False, is_sharded=True)):  # DDP; one device
        assert budget(case, found, layout, 1.0).phases == phases


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "over 8 devices; the teacher is cut up over them, all but its head; each has a whole student"),
        ({"sharded": False}, "over 8 devices; the teacher is whole on each; each"),
        ({"offload": True}, "over 8 devices; the teacher is whole on each; each"),
    ],
)
def test_the_report_says_where_the_teacher_is(settings, words):
    case = Case(None, None, None, HFTeacher("teacher", **settings), None, 1, 1, 1)
    planned = Budget([phase("student", activations=1)], 1.0)
    report = make_report(case, planned, HARDWARE["H200"], Layout(True, num_devices=8, is_sharded=True))
    assert any(words in note for note in report.notes)


def test_a_teacher_of_several_is_said_to_be_missing():
    teacher = MixtureTeacher({"a": HFTeacher("teacher")})
    planned = Budget([phase("student", activations=1)], 1.0)
    planned_as = _planned_teacher(teacher, Student())
    missing = " and MixtureTeacher, which is not counted,"
    for each, words in ((planned_as, missing), (TeacherElsewhere(teacher.offer, 100), "")):
        case = Case(None, None, None, each, None, 1, 1, 1)
        assert one_line(case, planned) == f"about 1e-06 MB of 1 GB at the peak, student (activations 1e-06 MB){words}"


@pytest.mark.parametrize(("sharded", "named"), [(None, set()), (False, {"teacher.sharded: null"}), (True, set())])
def test_remedies_for_a_teacher_do_not_contradict_its_settings(sharded, named):
    case = Case(Student(), None, Objective(), HFTeacher("teacher", sharded=sharded), None, 1, 1, 1)
    changes = {words: changed.teacher for words, changed in _changes(case, is_gpu=True)}
    assert named <= changes.keys() and ("teacher.sharded: null" in changes) == bool(named)
    offloaded = next(words for words in changes if words.startswith("teacher.offload: true"))
    assert (", teacher.sharded: null" in offloaded) == bool(sharded) and not changes[offloaded].is_shared


@pytest.mark.slow
def test_a_fit_says_it_before_it_starts_and_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opd_lightning.commands.plan_line._LEAST_BYTES", 0)
    monkeypatch.setattr("opd_lightning.commands.plan_line.memory_of", lambda device: 1e-3)
    words = ["--config", "@quickstart", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    words += ["--data.prompts_per_step", "4", "--data.sampling.max_new_tokens", "8", "--data.task.num_train", "64"]
    with pytest.warns(UserWarning, match=r"^plan: a step is likely to need more memory than cpu has, .* of 0.00 GB"):
        cli.main(["fit", *words, "--trainer.default_root_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert "plan: about " in said and "MB of 0.001 GB at the peak, student (" in said
