"""What a step would take, in memory and in seconds, found out without weights and without the hardware."""

from opd_lightning.planning.elsewhere import TeacherElsewhere
from opd_lightning.planning.hardware import HARDWARE, Hardware
from opd_lightning.planning.rehearsal import Case, Phase, rehearse

__all__ = ["HARDWARE", "Case", "Hardware", "Phase", "TeacherElsewhere", "rehearse"]
