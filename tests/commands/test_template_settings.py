"""Templates are settings of a run: what is measured is what the pasted settings make."""

import json
import shutil

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.commands.template_settings import TEACHERS_OWN, TemplateSettings, make_templates
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.interfaces import Sampling, Task
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.tasks import CleanedTask, DataSource, MathTask, PromptTask

WRAPPER = "Solve this step by step."


@pytest.fixture
def source(tmp_path):
    rows = [{"question": f"{WRAPPER} {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(tmp_path / "sums.jsonl"))


def make_pair(student, teacher, task=None):
    return Pair(
        student=HFStudent(str(student)),
        teacher=HFTeacher(str(teacher)),
        objective=DivergenceObjective(),
        task=task,
        engine=HFEngine(),
        teacher_engine=HFEngine(),
        sampling=Sampling(max_new_tokens=4),
        seed=0,
        max_tokens=512,
    )


def templates_of(task, given, folders, tmp_path):
    pair = make_pair(*folders, task=task)
    pair.teacher.preflight(pair.student)
    problems = pair.task.problems("train")[:2]
    return make_templates(given, pair, problems, "train", tmp_path / "diagnosis")


def as_pasted(task_class, train, settings):
    """The task that the settings make on top of a run's YAML."""
    parser = LightningArgumentParser()
    parser.add_argument("--task", type=Task)
    run = {"class_path": f"opd_lightning.tasks.{task_class}", "init_args": train}
    built = parser.parse_object({"task": settings}, namespace=parser.parse_object({"task": run}))
    return parser.instantiate(built).task


def test_words_of_the_task(source, tiny_qwen3_folder, tmp_path):
    given = [
        TemplateSettings(suffix=""),
        TemplateSettings("boxed", strip=[WRAPPER], suffix=" Put it into a box.", system_prompt="Be brief."),
    ]
    plain, boxed = templates_of(MathTask(source), given, [tiny_qwen3_folder] * 2, tmp_path)
    assert plain.name == "suffix ''" and boxed.name == "boxed"
    assert plain.problems[0].messages == ({"role": "user", "content": f"{WRAPPER} 0 + 1?"},)
    assert [message["content"] for message in boxed.problems[1].messages] == ["Be brief.", "1 + 1? Put it into a box."]
    for template in (plain, boxed):
        task = as_pasted("MathTask", {"train": {"path": source.path}}, template.settings["data"]["task"])
        assert task.problems("train")[:2] == template.problems


def test_a_task_around_another_is_asked_for_the_inner_one(source, tiny_qwen3_folder, tmp_path):
    task = CleanedTask(MathTask(source, validation=source, suffix=None), near_duplicates=None, held_out=())
    (template,) = templates_of(task, [TemplateSettings(suffix=" So?")], [tiny_qwen3_folder] * 2, tmp_path)
    assert template.settings == {"data": {"task": {"init_args": {"inner": {"init_args": {"suffix": " So?"}}}}}}
    assert template.problems[0].messages[0]["content"].endswith("0 + 1? So?")


def test_the_teachers_own_template_is_compared_too(source, tiny_qwen3_folder, tiny_teacher_folder, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder, teacher)
    (teacher / "chat_template.jinja").write_text("Q {{ messages[0]['content'] }}")
    with pytest.warns(UserWarning, match="chat templates of student and teacher differ"):
        off, own = templates_of(
            MathTask(source),
            [TemplateSettings(template_kwargs={"enable_thinking": False})],
            [tiny_qwen3_folder, teacher],
            tmp_path,
        )
    assert off.name.startswith("template_kwargs") and own.name == TEACHERS_OWN
    pasted = own.settings["model"]["student"]["init_args"]
    again = make_pair(tiny_qwen3_folder, teacher).student.with_template(pasted).tokenizer
    messages = own.problems[0].messages
    assert again.render(messages) == own.tokenizer.render(messages)
    assert again.decode(again.render(messages)).startswith("Q Solve this")


class Fixed(Task):
    def problems(self, split):
        return MathTask(self.source).problems(split)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([TemplateSettings()], r"templates\[0\]: it changes no setting. Give one of suffix, system_prompt"),
        ([TemplateSettings(chat_template="nothing")], r"chat_template: 'nothing' is neither a template"),
        ([TemplateSettings(strip=["absent"])], r"templates\[0\]: .* makes the same prompts as the template 'as config"),
        (
            [TemplateSettings("a", suffix="x"), TemplateSettings("a", suffix="y")],
            r"templates\[1\].name: 'a' is the name of another template",
        ),
        ([TemplateSettings(suffix="x" * 300)], r"templates\[0\]: the student reads at most"),
    ],
)
def test_mistakes(source, tiny_qwen3_folder, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        templates_of(MathTask(source), given, [tiny_qwen3_folder] * 2, tmp_path)


def test_settings_that_a_task_does_not_have_are_refused(source, tiny_qwen3_folder, tmp_path):
    folders = [tiny_qwen3_folder] * 2
    with pytest.raises(ValueError, match=r"data.task: PromptTask has no setting 'suffix' to put its questions otherw"):
        templates_of(PromptTask(source), [TemplateSettings(suffix="x")], folders, tmp_path)
    (kind,) = templates_of(PromptTask(source), [TemplateSettings(system_prompt="Be kind.")], folders, tmp_path)
    assert kind.problems[0].messages[0] == {"role": "system", "content": "Be kind."}
    task = Fixed()
    task.source = source
    with pytest.raises(ValueError, match=r"data\.task: Fixed has no setting 'system_prompt'"):
        templates_of(task, [TemplateSettings(system_prompt="x")], folders, tmp_path)
