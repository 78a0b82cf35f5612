"""A student class of the user's own trains, validates, resumes and is exported."""

from __future__ import annotations

import pytest
import torch
from own_students import BigramStudent, ShortStudent
from toys import adamw, make_data, make_trainer, weights_of

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.commands.cli import main
from opd_lightning.interfaces import Sampling, ScoreRequest, Teacher
from opd_lightning.objectives import DenseScores
from opd_lightning.rollouts.plain_engine import PlainEngine
from opd_lightning.training.checkpoints import build_student
from opd_lightning.training.module import OPDModule


class Uniform(Teacher):
    """Finds every token equally likely."""

    offer = ScoreRequest(top_k=10**6, arbitrary_ids=True, full_vocabulary=True)

    def setup(self, student, model, device):
        self.vocab_size = student.tokenizer.vocab_size

    def score(self, batch, request):
        logits = torch.zeros(batch.num_tokens, self.vocab_size)
        return DenseScores(logits.log_softmax(-1), batch.tokens.ids)


def short(student_folder, teacher_folder):
    module = OPDModule(ShortStudent(str(student_folder), num_layers=1), HFTeacher(str(teacher_folder)), optimizer=adamw)
    return module, make_data()


def bigram(*_):
    sampling = Sampling(max_new_tokens=6, stop_ids=[])
    return OPDModule(BigramStudent(width=5), Uniform(), optimizer=adamw), make_data(
        engine=PlainEngine(), sampling=sampling
    )


@pytest.mark.parametrize(("make", "name"), [(short, "ShortStudent"), (bigram, "BigramStudent")], ids=["hf", "torch"])
def test_from_training_to_export(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, make, name, capsys):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    whole, data = make(*folders)
    make_trainer(tmp_path, 4).fit(whole, data)
    first, data = make(*folders)
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed, data = make(*folders)
    make_trainer(tmp_path, 4).fit(resumed, data, ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(weight, weights_of(whole)[key]) for key, weight in weights_of(resumed).items())
    fresh, data = make(*folders)
    make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(fresh, data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert all(torch.equal(weight, weights_of(first)[key]) for key, weight in weights_of(fresh).items())
    arguments = ["export", "--ckpt_path", str(tmp_path / "x.ckpt"), "--output", str(tmp_path / "out")]
    main([*arguments, "--student_class", f"own_students.{name}"])
    if name == "BigramStudent":
        written = torch.load(tmp_path / "out" / "weights.pt")
        assert all(torch.equal(weight, weights_of(first)[key]) for key, weight in written.items())
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert len(model.model.layers) == 1
        assert all(torch.equal(weight, weights_of(first)[key]) for key, weight in model.named_parameters())


def test_without_the_flag_a_foreign_class_is_refused_with_its_name():
    with pytest.raises(
        ValueError, match=r"class 'own_students\.BigramStudent' is not ours.*--student_class own_students"
    ):
        build_student(BigramStudent().describe())


@pytest.mark.parametrize(
    ("student_class", "message"),
    [
        ("own_students.NoStudent", r"student_class: cannot import 'own_students\.NoStudent' .*Expected module\.Class"),
        ("no_such_module.Student", r"student_class: cannot import 'no_such_module\.Student'"),
        ("BigramStudent", r"student_class: cannot import 'BigramStudent'"),
        ("own_students.CharacterTokenizer", r"'own_students\.CharacterTokenizer' is no subclass of .*Student"),
        (
            "own_students.ShortStudent",
            r"was written with 'own_students\.BigramStudent', got 'own_students\.ShortStudent'",
        ),
    ],
)
def test_a_wrong_class_is_refused(student_class, message):
    with pytest.raises(ValueError, match=message):
        build_student(BigramStudent().describe(), student_class=student_class)


def test_a_class_of_a_script_is_found_in_its_file():
    description = BigramStudent(width=3).describe() | {"class_path": "__main__.BigramStudent"}
    assert build_student(description, student_class="own_students.BigramStudent").width == 3


def test_what_a_checkpoint_says_of_remote_code_does_not_count(tiny_qwen3_folder):
    description = ShortStudent(str(tiny_qwen3_folder), num_layers=2, trust_remote_code=True).describe()
    student = build_student(description, student_class="own_students.ShortStudent")
    assert (student.num_layers, student.trust_remote_code) == (2, False)
