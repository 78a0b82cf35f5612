"""Teachers made of what is already there. They know the seams only, whatever backend runs the models."""

from opd_lightning.teachers.base_model import BaseModelTeacher

__all__ = ["BaseModelTeacher"]
