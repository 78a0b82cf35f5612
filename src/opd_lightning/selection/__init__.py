"""Which prompts next: in order, shuffled, weighted, mixed by source, filtered, or by difficulty.

Every choice is a function of the seed and of saved counters, never of how far a generator has run: a run that crashed
and resumed draws what it would have drawn.
"""

from opd_lightning.selection.difficulty import DifficultyPool
from opd_lightning.selection.filtered import Filtered
from opd_lightning.selection.mixture import Mixture
from opd_lightning.selection.passes import InOrder, Shuffled
from opd_lightning.selection.weighted import Weighted

__all__ = ["DifficultyPool", "Filtered", "InOrder", "Mixture", "Shuffled", "Weighted"]
