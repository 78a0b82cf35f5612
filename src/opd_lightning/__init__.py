"""On-policy distillation with PyTorch Lightning, and EffOPD weight extrapolation for any trainer.

Names are loaded when they are first asked for: `EffOPD` needs Lightning, `EffOPDOptimizer` only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_lightning.callbacks.effopd import EffOPD as EffOPD
    from opd_lightning.callbacks.held_out_loss import HeldOutLoss as HeldOutLoss
    from opd_lightning.extrapolation.optimizer import EffOPDOptimizer as EffOPDOptimizer

__version__ = "0.1.0"

_HOMES = {
    "EffOPD": "opd_lightning.callbacks.effopd",
    "EffOPDOptimizer": "opd_lightning.extrapolation.optimizer",
    "HeldOutLoss": "opd_lightning.callbacks.held_out_loss",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
