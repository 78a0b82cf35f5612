"""On-policy distillation with PyTorch Lightning, and EffOPD weight extrapolation for any trainer.

Every public name is here: modules, callbacks, the classes a configuration may name, the seams and the words they speak.
They are loaded when they are first asked for: `EffOPD` needs Lightning, `EffOPDOptimizer` only torch, and transformers
is imported with the first `HF...` name. Anything not listed here may change without notice (CONTRIBUTING.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_lightning.backends.hf import CrossTokenizerTeacher as CrossTokenizerTeacher
    from opd_lightning.backends.hf import HFEngine as HFEngine
    from opd_lightning.backends.hf import HFStudent as HFStudent
    from opd_lightning.backends.hf import HFTeacher as HFTeacher
    from opd_lightning.backends.hf import LoraSettings as LoraSettings
    from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine as VLLMColocatedEngine
    from opd_lightning.backends.vllm.server import Connection as Connection
    from opd_lightning.backends.vllm.server import FileTransfer as FileTransfer
    from opd_lightning.backends.vllm.server import NCCLTransfer as NCCLTransfer
    from opd_lightning.backends.vllm.server import RubricJudge as RubricJudge
    from opd_lightning.backends.vllm.server import VLLMServerEngine as VLLMServerEngine
    from opd_lightning.backends.vllm.server import VLLMServerTeacher as VLLMServerTeacher
    from opd_lightning.callbacks.answers import AnswersWriter as AnswersWriter
    from opd_lightning.callbacks.effopd import EffOPD as EffOPD
    from opd_lightning.callbacks.effopd_scores import TaskAccuracy as TaskAccuracy
    from opd_lightning.callbacks.effopd_scores import TeacherKL as TeacherKL
    from opd_lightning.callbacks.effopd_scores import TeacherKLOnFixedRollouts as TeacherKLOnFixedRollouts
    from opd_lightning.callbacks.effopd_scores import TeacherKLOnNewRollouts as TeacherKLOnNewRollouts
    from opd_lightning.callbacks.entropy_gate import EntropyGate as EntropyGate
    from opd_lightning.callbacks.guards import EntropyGuard as EntropyGuard
    from opd_lightning.callbacks.guards import HeldOutGuard as HeldOutGuard
    from opd_lightning.callbacks.guards import LateEntropyGuard as LateEntropyGuard
    from opd_lightning.callbacks.guards import LengthGuard as LengthGuard
    from opd_lightning.callbacks.guards import OverlapGuard as OverlapGuard
    from opd_lightning.callbacks.held_out_loss import HeldOutLoss as HeldOutLoss
    from opd_lightning.callbacks.held_out_marks import HeldOutMarks as HeldOutMarks
    from opd_lightning.callbacks.learning_rate_search import LearningRateLineSearch as LearningRateLineSearch
    from opd_lightning.callbacks.live_report import LiveReport as LiveReport
    from opd_lightning.callbacks.mismatch import MismatchAlarm as MismatchAlarm
    from opd_lightning.callbacks.progress import StepProgressBar as StepProgressBar
    from opd_lightning.callbacks.projected_gradients import ProjectedGradients as ProjectedGradients
    from opd_lightning.callbacks.rescue import RescueCheckpoint as RescueCheckpoint
    from opd_lightning.callbacks.samples import PrintSamples as PrintSamples
    from opd_lightning.callbacks.source_metrics import SourceMetrics as SourceMetrics
    from opd_lightning.callbacks.start_validation import StartValidation as StartValidation
    from opd_lightning.callbacks.student_summary import StudentSummary as StudentSummary
    from opd_lightning.callbacks.token_recorder import TokenRecorder as TokenRecorder
    from opd_lightning.callbacks.update_recorder import UpdateRecorder as UpdateRecorder
    from opd_lightning.extrapolation.optimizer import EffOPDOptimizer as EffOPDOptimizer
    from opd_lightning.extrapolation.rate_search import RateSearch as RateSearch
    from opd_lightning.interfaces import Advantage as Advantage
    from opd_lightning.interfaces import Blend as Blend
    from opd_lightning.interfaces import LinearHead as LinearHead
    from opd_lightning.interfaces import LiveStudent as LiveStudent
    from opd_lightning.interfaces import MicroBatch as MicroBatch
    from opd_lightning.interfaces import Objective as Objective
    from opd_lightning.interfaces import Problem as Problem
    from opd_lightning.interfaces import Prompt as Prompt
    from opd_lightning.interfaces import PromptBatch as PromptBatch
    from opd_lightning.interfaces import PromptOutcome as PromptOutcome
    from opd_lightning.interfaces import PromptSelector as PromptSelector
    from opd_lightning.interfaces import ResponseTokens as ResponseTokens
    from opd_lightning.interfaces import Rollout as Rollout
    from opd_lightning.interfaces import RolloutBatch as RolloutBatch
    from opd_lightning.interfaces import RolloutEngine as RolloutEngine
    from opd_lightning.interfaces import RolloutSource as RolloutSource
    from opd_lightning.interfaces import RoundPart as RoundPart
    from opd_lightning.interfaces import Sampling as Sampling
    from opd_lightning.interfaces import Score as Score
    from opd_lightning.interfaces import ScoreRequest as ScoreRequest
    from opd_lightning.interfaces import StepFacts as StepFacts
    from opd_lightning.interfaces import StepPrompts as StepPrompts
    from opd_lightning.interfaces import Student as Student
    from opd_lightning.interfaces import Task as Task
    from opd_lightning.interfaces import Teacher as Teacher
    from opd_lightning.interfaces import TeacherScores as TeacherScores
    from opd_lightning.interfaces import Tokenizer as Tokenizer
    from opd_lightning.interfaces import TokenWeighting as TokenWeighting
    from opd_lightning.interfaces import TrainedRollout as TrainedRollout
    from opd_lightning.interfaces import WeightsLost as WeightsLost
    from opd_lightning.methods import TIP as TIP
    from opd_lightning.methods import AboveFloorThenUncertain as AboveFloorThenUncertain
    from opd_lightning.methods import AgreementWeight as AgreementWeight
    from opd_lightning.methods import AntiSelfDistillation as AntiSelfDistillation
    from opd_lightning.methods import BalancedMarks as BalancedMarks
    from opd_lightning.methods import BestOfTeacher as BestOfTeacher
    from opd_lightning.methods import ClippedForwardKL as ClippedForwardKL
    from opd_lightning.methods import DebiasedTeacher as DebiasedTeacher
    from opd_lightning.methods import DemonstratedOnly as DemonstratedOnly
    from opd_lightning.methods import DriftWeights as DriftWeights
    from opd_lightning.methods import EntropyAware as EntropyAware
    from opd_lightning.methods import Floor as Floor
    from opd_lightning.methods import ForwardKLWhereNegative as ForwardKLWhereNegative
    from opd_lightning.methods import Judge as Judge
    from opd_lightning.methods import KLBaseline as KLBaseline
    from opd_lightning.methods import LongReturn as LongReturn
    from opd_lightning.methods import Margin as Margin
    from opd_lightning.methods import MarginMask as MarginMask
    from opd_lightning.methods import MarginShift as MarginShift
    from opd_lightning.methods import MeanOverTeachers as MeanOverTeachers
    from opd_lightning.methods import PeerTeacher as PeerTeacher
    from opd_lightning.methods import PruningHorizon as PruningHorizon
    from opd_lightning.methods import RemainingSignal as RemainingSignal
    from opd_lightning.methods import RewardFloor as RewardFloor
    from opd_lightning.methods import RubricObjective as RubricObjective
    from opd_lightning.methods import SDPOObjective as SDPOObjective
    from opd_lightning.methods import SimCT as SimCT
    from opd_lightning.methods import StepWeights as StepWeights
    from opd_lightning.methods import TwoContexts as TwoContexts
    from opd_lightning.methods import Uncorrected as Uncorrected
    from opd_lightning.methods import UpsampledByPasses as UpsampledByPasses
    from opd_lightning.methods import Veto as Veto
    from opd_lightning.objectives import NLL as NLL
    from opd_lightning.objectives import CandidateScore as CandidateScore
    from opd_lightning.objectives import Clipped as Clipped
    from opd_lightning.objectives import Direct as Direct
    from opd_lightning.objectives import Divergence as Divergence
    from opd_lightning.objectives import DivergenceObjective as DivergenceObjective
    from opd_lightning.objectives import EntropyWeights as EntropyWeights
    from opd_lightning.objectives import Estimator as Estimator
    from opd_lightning.objectives import ForwardKL as ForwardKL
    from opd_lightning.objectives import FullVocabulary as FullVocabulary
    from opd_lightning.objectives import GroupReward as GroupReward
    from opd_lightning.objectives import Importance as Importance
    from opd_lightning.objectives import Intersection as Intersection
    from opd_lightning.objectives import JensenShannon as JensenShannon
    from opd_lightning.objectives import Masked as Masked
    from opd_lightning.objectives import PositionWeights as PositionWeights
    from opd_lightning.objectives import ReverseKL as ReverseKL
    from opd_lightning.objectives import SampledToken as SampledToken
    from opd_lightning.objectives import SampledTokenObjective as SampledTokenObjective
    from opd_lightning.objectives import ScoreObjective as ScoreObjective
    from opd_lightning.objectives import StudentScores as StudentScores
    from opd_lightning.objectives import StudentTopK as StudentTopK
    from opd_lightning.objectives import Support as Support
    from opd_lightning.objectives import SymmetricDifference as SymmetricDifference
    from opd_lightning.objectives import TeacherTopK as TeacherTopK
    from opd_lightning.objectives import Truncated as Truncated
    from opd_lightning.objectives import Union as Union
    from opd_lightning.reports.token_view import render_token_page as render_token_page
    from opd_lightning.rollouts.horizon import AdaptiveHorizon as AdaptiveHorizon
    from opd_lightning.rollouts.horizon import ConstantHorizon as ConstantHorizon
    from opd_lightning.rollouts.horizon import GrowingHorizon as GrowingHorizon
    from opd_lightning.rollouts.horizon import Horizon as Horizon
    from opd_lightning.rollouts.mixed_data import MixedData as MixedData
    from opd_lightning.rollouts.on_policy import OnPolicy as OnPolicy
    from opd_lightning.rollouts.one_step_ahead import OneStepAhead as OneStepAhead
    from opd_lightning.rollouts.plain_engine import PlainEngine as PlainEngine
    from opd_lightning.rollouts.reuse import Reuse as Reuse
    from opd_lightning.rollouts.stored import Stored as Stored
    from opd_lightning.rollouts.teacher_mixed import TeacherMixed as TeacherMixed
    from opd_lightning.rollouts.tool_use import Tool as Tool
    from opd_lightning.rollouts.tool_use import ToolUse as ToolUse
    from opd_lightning.sandbox.calculator import Calculator as Calculator
    from opd_lightning.selection import DifficultyPool as DifficultyPool
    from opd_lightning.selection import Filtered as Filtered
    from opd_lightning.selection import InOrder as InOrder
    from opd_lightning.selection import Mixture as Mixture
    from opd_lightning.selection import Shuffled as Shuffled
    from opd_lightning.selection import Weighted as Weighted
    from opd_lightning.tasks import ArithmeticTask as ArithmeticTask
    from opd_lightning.tasks import CleanedTask as CleanedTask
    from opd_lightning.tasks import DataSource as DataSource
    from opd_lightning.tasks import LedgerTask as LedgerTask
    from opd_lightning.tasks import MathTask as MathTask
    from opd_lightning.tasks import MixedTask as MixedTask
    from opd_lightning.tasks import PromptTask as PromptTask
    from opd_lightning.tasks import ScoredTask as ScoredTask
    from opd_lightning.teachers import BaseModelTeacher as BaseModelTeacher
    from opd_lightning.teachers import ExtrapolatedTeacher as ExtrapolatedTeacher
    from opd_lightning.teachers import MixtureTeacher as MixtureTeacher
    from opd_lightning.teachers import MovingAverageTeacher as MovingAverageTeacher
    from opd_lightning.teachers import PrivilegedTeacher as PrivilegedTeacher
    from opd_lightning.teachers import Routed as Routed
    from opd_lightning.teachers import StoredTeacher as StoredTeacher
    from opd_lightning.training.checkpoints import WholeCheckpoints as WholeCheckpoints
    from opd_lightning.training.checkpoints import export as export
    from opd_lightning.training.datamodule import OPDDataModule as OPDDataModule
    from opd_lightning.training.fsdp2 import FSDP2Strategy as FSDP2Strategy
    from opd_lightning.training.module import OPDModule as OPDModule
    from opd_lightning.training.schedules import WarmupDecay as WarmupDecay

__version__ = "0.1.0"

_HOMES = {
    "AboveFloorThenUncertain": "methods",
    "AdaptiveHorizon": "rollouts.horizon",
    "Advantage": "interfaces",
    "AgreementWeight": "methods",
    "AnswersWriter": "callbacks.answers",
    "AntiSelfDistillation": "methods",
    "ArithmeticTask": "tasks",
    "BalancedMarks": "methods",
    "BaseModelTeacher": "teachers",
    "BestOfTeacher": "methods",
    "Blend": "interfaces",
    "Calculator": "sandbox.calculator",
    "CandidateScore": "objectives",
    "CleanedTask": "tasks",
    "Clipped": "objectives",
    "ClippedForwardKL": "methods",
    "Connection": "backends.vllm.server",
    "ConstantHorizon": "rollouts.horizon",
    "CrossTokenizerTeacher": "backends.hf",
    "DataSource": "tasks",
    "DebiasedTeacher": "methods",
    "DemonstratedOnly": "methods",
    "DifficultyPool": "selection",
    "Direct": "objectives",
    "Divergence": "objectives",
    "DivergenceObjective": "objectives",
    "DriftWeights": "methods",
    "EffOPD": "callbacks.effopd",
    "EffOPDOptimizer": "extrapolation.optimizer",
    "EntropyAware": "methods",
    "EntropyGate": "callbacks.entropy_gate",
    "EntropyGuard": "callbacks.guards",
    "EntropyWeights": "objectives",
    "Estimator": "objectives",
    "ExtrapolatedTeacher": "teachers",
    "FSDP2Strategy": "training.fsdp2",
    "FileTransfer": "backends.vllm.server",
    "Filtered": "selection",
    "Floor": "methods",
    "ForwardKL": "objectives",
    "ForwardKLWhereNegative": "methods",
    "FullVocabulary": "objectives",
    "GroupReward": "objectives",
    "GrowingHorizon": "rollouts.horizon",
    "HFEngine": "backends.hf",
    "HFStudent": "backends.hf",
    "HFTeacher": "backends.hf",
    "HeldOutGuard": "callbacks.guards",
    "HeldOutLoss": "callbacks.held_out_loss",
    "HeldOutMarks": "callbacks.held_out_marks",
    "Horizon": "rollouts.horizon",
    "Importance": "objectives",
    "InOrder": "selection",
    "Intersection": "objectives",
    "JensenShannon": "objectives",
    "Judge": "methods",
    "KLBaseline": "methods",
    "LateEntropyGuard": "callbacks.guards",
    "LearningRateLineSearch": "callbacks.learning_rate_search",
    "LedgerTask": "tasks",
    "LengthGuard": "callbacks.guards",
    "LinearHead": "interfaces",
    "LiveReport": "callbacks.live_report",
    "LiveStudent": "interfaces",
    "LongReturn": "methods",
    "LoraSettings": "backends.hf",
    "Margin": "methods",
    "MarginMask": "methods",
    "MarginShift": "methods",
    "Masked": "objectives",
    "MathTask": "tasks",
    "MeanOverTeachers": "methods",
    "MicroBatch": "interfaces",
    "MismatchAlarm": "callbacks.mismatch",
    "MixedData": "rollouts.mixed_data",
    "MixedTask": "tasks",
    "Mixture": "selection",
    "MixtureTeacher": "teachers",
    "MovingAverageTeacher": "teachers",
    "NCCLTransfer": "backends.vllm.server",
    "NLL": "objectives",
    "OPDDataModule": "training.datamodule",
    "OPDModule": "training.module",
    "Objective": "interfaces",
    "OnPolicy": "rollouts.on_policy",
    "OneStepAhead": "rollouts.one_step_ahead",
    "OverlapGuard": "callbacks.guards",
    "PeerTeacher": "methods",
    "PlainEngine": "rollouts.plain_engine",
    "PositionWeights": "objectives",
    "PrintSamples": "callbacks.samples",
    "PrivilegedTeacher": "teachers",
    "Problem": "interfaces",
    "ProjectedGradients": "callbacks.projected_gradients",
    "Prompt": "interfaces",
    "PromptBatch": "interfaces",
    "PromptOutcome": "interfaces",
    "PromptSelector": "interfaces",
    "PromptTask": "tasks",
    "PruningHorizon": "methods",
    "RateSearch": "extrapolation.rate_search",
    "RemainingSignal": "methods",
    "RescueCheckpoint": "callbacks.rescue",
    "ResponseTokens": "interfaces",
    "Reuse": "rollouts.reuse",
    "ReverseKL": "objectives",
    "RewardFloor": "methods",
    "Rollout": "interfaces",
    "RolloutBatch": "interfaces",
    "RolloutEngine": "interfaces",
    "RolloutSource": "interfaces",
    "RoundPart": "interfaces",
    "Routed": "teachers",
    "RubricJudge": "backends.vllm.server",
    "RubricObjective": "methods",
    "SDPOObjective": "methods",
    "SampledToken": "objectives",
    "SampledTokenObjective": "objectives",
    "Sampling": "interfaces",
    "Score": "interfaces",
    "ScoreObjective": "objectives",
    "ScoreRequest": "interfaces",
    "ScoredTask": "tasks",
    "Shuffled": "selection",
    "SimCT": "methods",
    "SourceMetrics": "callbacks.source_metrics",
    "StartValidation": "callbacks.start_validation",
    "StepFacts": "interfaces",
    "StepProgressBar": "callbacks.progress",
    "StepPrompts": "interfaces",
    "StepWeights": "methods",
    "Stored": "rollouts.stored",
    "StoredTeacher": "teachers",
    "Student": "interfaces",
    "StudentScores": "objectives",
    "StudentSummary": "callbacks.student_summary",
    "StudentTopK": "objectives",
    "Support": "objectives",
    "SymmetricDifference": "objectives",
    "TIP": "methods",
    "Task": "interfaces",
    "TaskAccuracy": "callbacks.effopd_scores",
    "Teacher": "interfaces",
    "TeacherKL": "callbacks.effopd_scores",
    "TeacherKLOnFixedRollouts": "callbacks.effopd_scores",
    "TeacherKLOnNewRollouts": "callbacks.effopd_scores",
    "TeacherMixed": "rollouts.teacher_mixed",
    "TeacherScores": "interfaces",
    "TeacherTopK": "objectives",
    "TokenRecorder": "callbacks.token_recorder",
    "TokenWeighting": "interfaces",
    "Tokenizer": "interfaces",
    "Tool": "rollouts.tool_use",
    "ToolUse": "rollouts.tool_use",
    "TrainedRollout": "interfaces",
    "Truncated": "objectives",
    "TwoContexts": "methods",
    "Uncorrected": "methods",
    "Union": "objectives",
    "UpdateRecorder": "callbacks.update_recorder",
    "UpsampledByPasses": "methods",
    "VLLMColocatedEngine": "backends.vllm.colocated",
    "VLLMServerEngine": "backends.vllm.server",
    "VLLMServerTeacher": "backends.vllm.server",
    "Veto": "methods",
    "WarmupDecay": "training.schedules",
    "Weighted": "selection",
    "WeightsLost": "interfaces",
    "WholeCheckpoints": "training.checkpoints",
    "export": "training.checkpoints",
    "render_token_page": "reports.token_view",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"opd_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
