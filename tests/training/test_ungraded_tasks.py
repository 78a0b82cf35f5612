"""Tasks without answers: what cannot work with them is refused before anything is trained."""

import pytest
import torch
from toys import LetterTask, make_data, make_module, make_trainer

from opd_lightning import EffOPD, TaskAccuracy, TeacherKL
from opd_lightning.interfaces import Task
from opd_lightning.objectives import NLL
from opd_lightning.selection import DifficultyPool, Filtered
from opd_lightning.teachers import MovingAverageTeacher


class Questions(Task):
    def problems(self, split):
        return LetterTask().problems(split)


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


@pytest.mark.parametrize("selector", [DifficultyPool(), Filtered(inner=DifficultyPool(), where={"level": [0, 1]})])
def test_a_selector_that_learns_from_rewards_is_refused(tmp_path, folders, selector):
    with pytest.raises(ValueError, match=r"data.selector: \w+ learns from rewards, but Questions has no answers"):
        make_trainer(tmp_path, 1).fit(make_module(*folders), make_data(task=Questions(), selector=selector))


def test_a_score_that_needs_marks_is_refused(tmp_path, folders):
    trainer = make_trainer(tmp_path, 1, callbacks=[EffOPD(TaskAccuracy(num_prompts=4))])
    with pytest.raises(ValueError, match=r"TaskAccuracy needs marks, but Questions has no answers. Use TeacherKL"):
        trainer.fit(make_module(*folders), make_data(task=Questions()))


def test_a_score_without_a_teacher_is_refused_before_training(tmp_path, folders):
    module = make_module(*folders, objective=NLL())
    module.teacher = None
    trainer = make_trainer(tmp_path, 1, callbacks=[EffOPD(TeacherKL(num_prompts=4))])
    with pytest.raises(ValueError, match=r"divergence from the teacher, but model.teacher is not set"):
        trainer.fit(module, make_data())


def test_validation_measures_the_divergence_in_fit_and_by_itself(tmp_path, folders):
    data = make_data(task=Questions())
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
    trainer.fit(make_module(*folders), data)
    assert trainer.callback_metrics["val/reverse_kl"] > 0
    again = make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(make_module(*folders), data, verbose=False)[0]
    assert again["val/reverse_kl"] > 0
    assert not any("avg_at" in name for name in again)


def test_an_average_of_the_student_is_not_forgotten_by_a_validation_after_the_fit(tmp_path, folders):
    teacher = MovingAverageTeacher(rate=0.01)
    module, data = make_module(*folders, teacher_object=teacher, objective=NLL()), make_data(task=Questions())
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    trainer.fit(module, data)
    average = teacher.state_dict()["average"]
    assert trainer.validate(module, data, verbose=False)[0]["val/reverse_kl"] > 1e-6  # of itself it would be 0
    assert all(torch.equal(weight, average[name]) for name, weight in teacher.state_dict()["average"].items())


def test_a_process_without_answers_of_its_own_keeps_the_names_of_the_others(tmp_path, folders):
    module, data = make_module(*folders), make_data(task=Questions())
    make_trainer(tmp_path, 1, limit_val_batches=1.0).validate(module, data, verbose=False)
    names = module.held_out_facts.names
    module.study_answers([])
    assert "reverse_kl" in names and len(module.held_out_facts.totals) == len(names)
    assert module.held_out_facts.compute() == {}
