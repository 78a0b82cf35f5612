"""The recipe with several teachers: its routes lead from every problem of its task."""

from pathlib import Path

import yaml

from opd_lightning.tasks import ArithmeticTask
from opd_lightning.teachers import BaseModelTeacher, Routed

CONFIG = Path(__file__).parents[2] / "configs" / "methods" / "multi_teacher.yaml"


def test_every_problem_has_its_teacher():
    settings = yaml.safe_load(CONFIG.read_text())["model"]["teacher"]["init_args"]
    teachers = {name: BaseModelTeacher() for name in settings["teachers"]}
    routed = Routed(teachers, settings["column"], settings["routes"])
    problems = ArithmeticTask(num_train=8).problems("train")
    routed.check_problems(problems)
    assert [routed.route(problem) for problem in problems[:4]] == ["short", "short", "long", "long"]
