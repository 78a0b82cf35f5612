"""What a step would take, in memory and in seconds, found out without weights and without the hardware."""

from opd_lightning.planning.budget import Budget, Layout, budget
from opd_lightning.planning.case import Case, Phase, Rehearsal
from opd_lightning.planning.elsewhere import TeacherElsewhere
from opd_lightning.planning.hardware import HARDWARE, Hardware
from opd_lightning.planning.machine import THIS_MACHINE, memory_of, this_machine
from opd_lightning.planning.rehearsal import NotPlannedError, rehearse
from opd_lightning.planning.remedies import Remedy, remedies

__all__ = [
    "HARDWARE",
    "THIS_MACHINE",
    "Budget",
    "Case",
    "Hardware",
    "Layout",
    "NotPlannedError",
    "Phase",
    "Rehearsal",
    "Remedy",
    "TeacherElsewhere",
    "budget",
    "memory_of",
    "rehearse",
    "remedies",
    "this_machine",
]
