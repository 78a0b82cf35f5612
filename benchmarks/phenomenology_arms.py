"""What phenomenology.py runs: one arm per pair and setting, and which arms show which phenomenon.

Chosen before any run that counts: the rate of every arm, 5e-4, is the best of the sweep in benchmarks/README.md
(there with 64 rollouts a step); 20 steps of 32 rollouts bring the sandbox's own pair most of the way. How the models
came about is in `opd_lightning.sandbox.make_zoo`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from opd_lightning.interfaces import Objective
from opd_lightning.objectives import (
    CandidateScore,
    DivergenceObjective,
    Intersection,
    SampledTokenObjective,
    StudentTopK,
    SymmetricDifference,
)
from opd_lightning.sandbox.notations import Template

SEEDS = (0, 1, 2)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "full": DivergenceObjective,
    "student-16": lambda: DivergenceObjective(StudentTopK(16)),
    "overlap-16": lambda: DivergenceObjective(Intersection(16)),
    "non-overlap-16": lambda: DivergenceObjective(SymmetricDifference(16)),
    "sampled": SampledTokenObjective,
    "top-1": lambda: DivergenceObjective(StudentTopK(1, normalization="none"), estimator=CandidateScore()),
    "student-4": lambda: DivergenceObjective(StudentTopK(4)),
    "student-64": lambda: DivergenceObjective(StudentTopK(64)),
}


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        student: Model of the zoo, or `student` or `teacher` of the sandbox.
        teacher: Likewise.
        objective: Key of OBJECTIVES.
        template: How training prompts are asked.
        horizon: Response tokens trained on; None: whole answers.
        levels: Levels trained on and held out.
        cold_start: Steps of imitation of the teacher's answers to other prompts, before.
        num_steps: Of distillation.
        learning_rate: Of AdamW, constant, in both stages.
    """

    student: str
    teacher: str
    objective: str = "full"
    template: Template = "plain"
    horizon: int | None = None
    levels: tuple[int, ...] = (1, 2)
    cold_start: int = 0
    num_steps: int = 20
    learning_rate: float = 5e-4

    @property
    def name(self) -> str:
        """For example `student from teacher` or `student from teacher, objective=top-4`."""
        default = Arm("", "")
        fields = ("objective", "template", "horizon", "levels", "cold_start", "num_steps", "learning_rate")
        changed = [
            f"{field}={getattr(self, field)}" for field in fields if getattr(self, field) != getattr(default, field)
        ]
        return ", ".join([f"{self.student} from {self.teacher}", *changed])


BASE = Arm("student", "teacher")
PHENOMENA: dict[str, dict[str, Arm]] = {  # what the arms are called in the tables, in the order of running
    "compatibility": {
        "compatible, lower score": Arm("student", "half-careful"),
        "compatible, slightly lower score": Arm("student", "mostly-careful"),
        "incompatible, higher score": Arm("student", "other-notation"),
    },
    "cold_start": {
        "diffuse student, directly": Arm("diffuse-student", "teacher"),
        "diffuse student, directly, 35 steps": Arm("diffuse-student", "teacher", num_steps=35),
        "diffuse student, after imitation": Arm("diffuse-student", "teacher", cold_start=15),
        "other notation, directly": Arm("student", "other-notation"),
        "other notation, after imitation": Arm("student", "other-notation", cold_start=15),
    },
    "new_capability": {
        "bigger teacher, same pipeline": Arm("small-student", "student"),
        "the same bigger teacher, tuned further": Arm("small-student", "teacher"),
    },
    "overlap": {
        "success: student from teacher": BASE,
        "incompatible: other notation": Arm("student", "other-notation"),
        "nothing new: bigger teacher, same pipeline": Arm("small-student", "student"),
    },
    "reverse": {
        "its own earlier self": Arm("teacher", "student"),
        "a smaller model of the earlier pipeline": Arm("teacher", "small-student"),
    },
    "support": {
        "full vocabulary": BASE,
        "student's top 16": Arm("student", "teacher", "student-16"),
        "overlap of the top 16": Arm("student", "teacher", "overlap-16"),
        "the rest of both top 16": Arm("student", "teacher", "non-overlap-16"),
    },
    "horizon": {
        "8 tokens": Arm("student", "teacher", horizon=8),
        "16 tokens": Arm("student", "teacher", horizon=16),
        "whole answers": BASE,
    },
    "size_of_support": {
        "sampled token": Arm("student", "teacher", "sampled"),
        "top 1 of the paper's code": Arm("student", "teacher", "top-1"),
        "top 4": Arm("student", "teacher", "student-4"),
        "top 16": Arm("student", "teacher", "student-16"),
        "top 64": Arm("student", "teacher", "student-64"),
    },
    "template": {
        "the teacher's template": Arm("two-templates-student", "two-templates-teacher"),
        "another template": Arm("two-templates-student", "two-templates-teacher", template="question"),
    },
}
