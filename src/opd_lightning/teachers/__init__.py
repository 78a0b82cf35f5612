"""Teachers made of what is already there. They know the seams only, whatever backend runs the models."""

from opd_lightning.teachers.base_model import BaseModelTeacher
from opd_lightning.teachers.extrapolated import ExtrapolatedTeacher
from opd_lightning.teachers.kept_scores import KeptScores

__all__ = ["BaseModelTeacher", "ExtrapolatedTeacher", "KeptScores"]
