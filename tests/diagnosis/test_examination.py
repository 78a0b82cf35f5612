"""A whole diagnosis of tiny real models."""

import json
import shutil

import pytest
import torch
from diagnosed import QuestionsOnly, make_diagnosis, make_pair
from toys import LetterTask

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.diagnosis.examination import diagnose
from opd_lightning.diagnosis.report import as_json, make_report
from opd_lightning.diagnosis.verdicts import verdicts
from opd_lightning.interfaces import ScoreRequest
from opd_lightning.rollouts.plain_engine import PlainEngine

SMALL = {"num_samples": 2, "num_bins": 3, "num_gradient_rollouts": 1}


class SilentTeacher(HFTeacher):
    """Scores sampled tokens only, and cannot be asked to answer: what a server gives."""

    @property
    def offer(self):
        return ScoreRequest()

    def as_student(self):
        return None


def prepared(pair, num_problems=3):
    pair.teacher.preflight(pair.student)
    return pair, pair.task.problems("train")[:num_problems]


def test_the_same_model_twice_adds_nothing(tiny_qwen3_folder):
    pair, problems = prepared(make_pair(tiny_qwen3_folder, tiny_qwen3_folder))
    found = diagnose(pair, problems, **SMALL)
    assert found.facts["overlap_ratio"] == found.facts["overlap_mass_student"] / found.facts["student_top_mass"] == 1
    assert found.facts["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert found.facts["student_entropy"] == pytest.approx(found.facts["teacher_entropy"])
    assert "The teacher adds nothing new here" in [each.words for each in verdicts(found)]
    assert found.student == found.teacher  # the same seeds, so the same answers
    assert found.continuations[0].gain.value == 0 and found.teacher_own_template is None
    assert pair.model is None  # let go of


def test_a_pair_is_measured_and_measured_again_alike(tiny_qwen3_folder, tiny_teacher_folder):
    said, generator = [], torch.get_rng_state()
    pair, problems = prepared(make_pair(tiny_qwen3_folder, tiny_teacher_folder))
    found = diagnose(pair, problems, say=said.append, **SMALL)
    assert (found.num_prompts, found.num_rollouts, found.k) == (3, 6, 16)
    assert found.num_tokens == sum(each.num_tokens for each in found.positions)
    mean = sum(each.num_tokens * each.facts["reverse_kl"] for each in found.positions) / found.num_tokens
    assert found.facts["reverse_kl"] == pytest.approx(mean) and mean > 0
    assert [each.depth for each in found.continuations] == [0, 1, 2, 3]
    assert said[0] == "the student answers 3 prompts, 2 times each" and said[-1].startswith("gradients of")
    again = diagnose(*prepared(make_pair(tiny_qwen3_folder, tiny_teacher_folder)), **SMALL)
    assert json.dumps(as_json(again), allow_nan=False) == json.dumps(as_json(found), allow_nan=False)
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_cannot_be_known_is_left_out_and_said(tiny_qwen3_folder, tiny_teacher_folder):
    teacher = SilentTeacher(str(tiny_teacher_folder), dtype="float32")
    pair = make_pair(tiny_qwen3_folder, teacher, task=QuestionsOnly(), teacher_engine=PlainEngine())
    found = diagnose(*prepared(pair), **SMALL)
    assert found.teacher is found.reward_auroc is found.student.accuracy is None and found.continuations == ()
    assert "reverse_kl" not in found.facts and found.facts["sampled_log_ratio"] is not None
    subjects = [each.split(":")[0] for each in found.left_out]
    assert subjects == [
        "Accuracies, gains and the AUROC of the reward",
        "The teacher's own answers and its continuations",
        "What needs the teacher's whole vocabulary",
    ]
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["teacher"] is None
    assert make_report(found).statements[-1].words.startswith("Use the longest list")


def test_a_template_of_its_own_gets_answers_of_its_own(tiny_qwen3_folder, tiny_teacher_folder, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder, other)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    pair = make_pair(tiny_qwen3_folder, other, task=LetterTask())
    with pytest.warns(UserWarning, match="chat templates of student and teacher differ"):
        pair, problems = prepared(pair)
    found = diagnose(pair, problems, **SMALL)
    assert found.prompt.num_different == 3 and found.prompt.teacher == "say a"
    assert found.teacher_own_template is not None and found.teacher_own_template != found.teacher


def test_the_report_names_every_verdict_and_its_rule():
    diagnosis = make_diagnosis()
    report, plain = make_report(diagnosis), as_json(diagnosis)
    assert [each.words for each in report.statements] == [each["words"] for each in (*plain["verdicts"], plain["loss"])]
    tables = {table.title: table for table in report.tables}
    answers = tables["Answers"]
    assert answers.columns == ("", "student", "teacher")
    assert answers.rows[0] == ("accuracy", "50.0% ± 2.0%", "70.0% ± 2.0%")
    assert tables["How deep is the teacher still useful"].rows[1] == ("16", "100", "50.0%", "60.0%", "10.0% ± 2.0%")
    assert plain["gradients"]["losses"][0]["noise_scale"] == pytest.approx(4)
    assert plain["version"] == 1 and plain["facts"]["overlap_ratio"] == 0.75
