"""What the data module takes where nothing is set, imported when it is: transformers is slow, and not always wanted."""

from __future__ import annotations

from opd_lightning.interfaces import PromptSelector, RolloutEngine


def default_engine() -> RolloutEngine:
    """The live student through transformers."""
    from opd_lightning.backends.hf import HFEngine

    return HFEngine()


def default_selector() -> PromptSelector:
    """All problems, in a new order in every pass."""
    from opd_lightning.selection import Shuffled

    return Shuffled()
