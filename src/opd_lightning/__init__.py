"""On-policy distillation with PyTorch Lightning, and EffOPD weight extrapolation for any trainer.

Names are loaded when they are first asked for: `EffOPD` needs Lightning, `EffOPDOptimizer` only torch, and transformers
is imported with the first `HF...` name. Seams and words are in `opd_lightning.interfaces`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_lightning.backends.hf import HFEngine as HFEngine
    from opd_lightning.backends.hf import HFStudent as HFStudent
    from opd_lightning.backends.hf import HFTeacher as HFTeacher
    from opd_lightning.backends.hf import LoraSettings as LoraSettings
    from opd_lightning.callbacks.effopd import EffOPD as EffOPD
    from opd_lightning.callbacks.effopd_scores import TaskAccuracy as TaskAccuracy
    from opd_lightning.callbacks.effopd_scores import TeacherKL as TeacherKL
    from opd_lightning.callbacks.effopd_scores import TeacherKLOnFixedRollouts as TeacherKLOnFixedRollouts
    from opd_lightning.callbacks.effopd_scores import TeacherKLOnNewRollouts as TeacherKLOnNewRollouts
    from opd_lightning.callbacks.held_out_loss import HeldOutLoss as HeldOutLoss
    from opd_lightning.callbacks.learning_rate_search import LearningRateLineSearch as LearningRateLineSearch
    from opd_lightning.callbacks.samples import PrintSamples as PrintSamples
    from opd_lightning.callbacks.update_recorder import UpdateRecorder as UpdateRecorder
    from opd_lightning.extrapolation.optimizer import EffOPDOptimizer as EffOPDOptimizer
    from opd_lightning.interfaces import Sampling as Sampling
    from opd_lightning.objectives import NLL as NLL
    from opd_lightning.objectives import DivergenceObjective as DivergenceObjective
    from opd_lightning.objectives import SampledTokenObjective as SampledTokenObjective
    from opd_lightning.rollouts.horizon import AdaptiveHorizon as AdaptiveHorizon
    from opd_lightning.rollouts.horizon import ConstantHorizon as ConstantHorizon
    from opd_lightning.rollouts.horizon import GrowingHorizon as GrowingHorizon
    from opd_lightning.rollouts.on_policy import OnPolicy as OnPolicy
    from opd_lightning.rollouts.one_step_ahead import OneStepAhead as OneStepAhead
    from opd_lightning.rollouts.plain_engine import PlainEngine as PlainEngine
    from opd_lightning.rollouts.reuse import Reuse as Reuse
    from opd_lightning.tasks import ArithmeticTask as ArithmeticTask
    from opd_lightning.tasks import LedgerTask as LedgerTask
    from opd_lightning.tasks import MathTask as MathTask
    from opd_lightning.teachers import BaseModelTeacher as BaseModelTeacher
    from opd_lightning.training.datamodule import OPDDataModule as OPDDataModule
    from opd_lightning.training.module import OPDModule as OPDModule
    from opd_lightning.training.schedules import WarmupDecay as WarmupDecay

__version__ = "0.1.0"

_HOMES = {
    "HFEngine": "backends.hf",
    "HFStudent": "backends.hf",
    "HFTeacher": "backends.hf",
    "LoraSettings": "backends.hf",
    "EffOPD": "callbacks.effopd",
    "TaskAccuracy": "callbacks.effopd_scores",
    "TeacherKL": "callbacks.effopd_scores",
    "TeacherKLOnFixedRollouts": "callbacks.effopd_scores",
    "TeacherKLOnNewRollouts": "callbacks.effopd_scores",
    "HeldOutLoss": "callbacks.held_out_loss",
    "LearningRateLineSearch": "callbacks.learning_rate_search",
    "PrintSamples": "callbacks.samples",
    "UpdateRecorder": "callbacks.update_recorder",
    "EffOPDOptimizer": "extrapolation.optimizer",
    "Sampling": "interfaces",
    "NLL": "objectives",
    "DivergenceObjective": "objectives",
    "SampledTokenObjective": "objectives",
    "AdaptiveHorizon": "rollouts.horizon",
    "ConstantHorizon": "rollouts.horizon",
    "GrowingHorizon": "rollouts.horizon",
    "OneStepAhead": "rollouts.one_step_ahead",
    "OnPolicy": "rollouts.on_policy",
    "PlainEngine": "rollouts.plain_engine",
    "Reuse": "rollouts.reuse",
    "ArithmeticTask": "tasks",
    "BaseModelTeacher": "teachers",
    "MathTask": "tasks",
    "OPDDataModule": "training.datamodule",
    "OPDModule": "training.module",
    "LedgerTask": "tasks",
    "WarmupDecay": "training.schedules",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"opd_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
