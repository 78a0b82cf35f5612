"""Problems, their rendering as chat messages, and the marking of answers: one task per file."""

from opd_lightning.tasks.arithmetic import ArithmeticTask
from opd_lightning.tasks.math import MathTask
from opd_lightning.tasks.sources import Source

__all__ = ["ArithmeticTask", "MathTask", "Source"]
