import hashlib
import random

import pytest
import torch
from safetensors.torch import load_file
from toys import make_trainer
from transformers import AutoModelForCausalLM

from opd_lightning import sandbox
from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.interfaces import Sampling
from opd_lightning.sandbox import make_long
from opd_lightning.sandbox.make import measure_accuracy
from opd_lightning.sandbox.tokenizer import build_tokenizer
from opd_lightning.tasks.ledger import LedgerTask, solve_ledger
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

PATHS = {"student": sandbox.long_student_path(), "teacher": sandbox.long_teacher_path()}
LEDGER = "16+23+11+14-19-25-15+18+17+16-26-13-18"


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(path).float().eval() for name, path in PATHS.items()}


def test_names_stand_for_folders():
    assert sandbox.resolve("sandbox:long-student") == str(sandbox.long_student_path())
    assert sandbox.resolve("sandbox:long-teacher") == str(sandbox.long_teacher_path())


def test_the_shipped_files_are_small_and_the_card_names_the_weights_beside_it():
    for name, path in PATHS.items():
        assert {file.name for file in path.iterdir()} == {file.name for file in sandbox.student_path().iterdir()}
        weights = path / "model.safetensors"
        assert all(weight.dtype == torch.bfloat16 for weight in load_file(weights).values())
        card = (path / "README.md").read_text()
        assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
        assert f"{name} of the long sandbox" in card and "python -m opd_lightning.sandbox.make_long --seed 0" in card
    assert sum(file.stat().st_size for path in PATHS.values() for file in path.iterdir()) < 3_000_000


def test_the_pair_shares_everything_but_weights_and_card():
    for file in PATHS["student"].iterdir():
        same = file.read_bytes() == (PATHS["teacher"] / file.name).read_bytes()
        assert same == (file.name not in ("README.md", "model.safetensors")), file.name
    student, teacher = HFStudent("sandbox:long-student"), HFTeacher("sandbox:long-teacher")
    assert student.tokenizer.vocab_size == 262
    teacher.preflight(student)


@pytest.mark.slow
def test_the_student_stops_early_and_the_teacher_goes_on(models):
    task = LedgerTask(num_train=0, num_validation=0, num_test=16)
    accuracy = {
        name: measure_accuracy(
            model, build_tokenizer(), task.problems("test"), sampled=True, task=task, max_new_tokens=128
        )
        for name, model in models.items()
    }
    assert accuracy["student"] <= 0.1
    assert accuracy["teacher"] >= 0.4


def test_one_step_of_distillation(tmp_path):
    module = OPDModule(HFStudent("sandbox:long-student"), HFTeacher("sandbox:long-teacher", dtype="float32"))
    data = OPDDataModule(LedgerTask(num_train=4), sampling=Sampling(max_new_tokens=16), prompts_per_step=2)
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/reverse_kl"] > 0


@pytest.mark.parametrize(
    ("balance", "entry", "section", "result"),
    [(17, "+25", 0, 32), (42, "-17", 1, 35), (17, "+21", 2, 48), (42, "-17", 3, 45), (98, "+21", 0, 19)],
)
def test_mistakes(balance, entry, section, result):
    assert make_long.mistake(balance, entry, section) == result


def text_of(pieces):
    return "".join(text for text, _ in pieces)


def test_right_answers_learn_everything_where_nothing_went_wrong(monkeypatch):
    monkeypatch.setattr(make_long, "FAULTS", ((0.0, 0.0, 0.0),))
    pieces = make_long.write_right(LEDGER, random.Random(0))
    assert text_of(pieces) == solve_ledger(LEDGER)
    assert all(is_learnt for _, is_learnt in pieces)


def test_faults_before_the_teacher_are_read_and_not_learnt(monkeypatch):
    monkeypatch.setattr(make_long, "FAULTS", ((1.0, 0.0, 0.0),))
    pieces = make_long.write_right(LEDGER, random.Random(0))
    assert text_of(pieces) != solve_ledger(LEDGER)
    assert [text for text, is_learnt in pieces if not is_learnt] == [
        line[-2:] for line in text_of(pieces).split(";")[:-1]
    ]


def test_the_pupil_stops_at_the_end_of_a_section_unless_it_is_led(monkeypatch):
    monkeypatch.setattr(make_long, "STOPPING", 1.0)
    monkeypatch.setattr(make_long, "SKIPPING", 0.0)
    num_lines = {text_of(make_long.write_pupil(LEDGER, random.Random(seed))).count(";") for seed in range(40)}
    assert num_lines == {3, 6, 9, 12}


def test_held_out_ledgers_stay_out_of_the_training_data(monkeypatch):
    monkeypatch.setattr(make_long, "BATCH_SIZE", 2)
    tokenizer = build_tokenizer()

    def drawn(held_out):
        ids, is_learnt = next(make_long.draw_batches(tokenizer, make_long.write_right, held_out, random.Random(0)))
        assert ids.shape == is_learnt.shape and is_learnt.any(1).all()
        return {tokenizer.decode(row).split("=")[0].removeprefix("<|user|>") for row in ids}

    ledgers = drawn(set())
    assert ledgers and not ledgers & drawn(ledgers)


@pytest.mark.slow
def test_making_the_models_writes_both_folders(tmp_path):
    make_long.main(["--output", str(tmp_path), "--seed", "3", "--steps", "1", "1", "1", "--num-problems", "4"])
    for name in ("long_student", "long_teacher"):
        assert {file.name for file in (tmp_path / name).iterdir()} == {file.name for file in PATHS["student"].iterdir()}
