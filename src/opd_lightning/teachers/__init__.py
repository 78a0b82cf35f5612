"""Teachers made of what is already there. They know the seams only, whatever backend runs the models."""

from opd_lightning.teachers.base_model import BaseModelTeacher
from opd_lightning.teachers.extrapolated import ExtrapolatedTeacher
from opd_lightning.teachers.kept_scores import KeptScores
from opd_lightning.teachers.mixture import MixtureTeacher
from opd_lightning.teachers.moving_average import MovingAverageTeacher
from opd_lightning.teachers.privileged import PrivilegedTeacher
from opd_lightning.teachers.routed import Routed
from opd_lightning.teachers.stored_teacher import StoredTeacher

__all__ = [
    "BaseModelTeacher",
    "ExtrapolatedTeacher",
    "KeptScores",
    "MixtureTeacher",
    "MovingAverageTeacher",
    "PrivilegedTeacher",
    "Routed",
    "StoredTeacher",
]
