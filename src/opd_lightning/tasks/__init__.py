"""Problems, their rendering as chat messages, and the marking of answers (if there are any): one task per file."""

from opd_lightning.tasks.arithmetic import ArithmeticTask
from opd_lightning.tasks.cleaned import CleanedTask
from opd_lightning.tasks.ledger import LedgerTask
from opd_lightning.tasks.mathematics import MathTask
from opd_lightning.tasks.mixed import MixedTask
from opd_lightning.tasks.prompts import PromptTask
from opd_lightning.tasks.scored import ScoredTask
from opd_lightning.tasks.sources import DataSource

__all__ = [
    "ArithmeticTask",
    "CleanedTask",
    "DataSource",
    "LedgerTask",
    "MathTask",
    "MixedTask",
    "PromptTask",
    "ScoredTask",
]
