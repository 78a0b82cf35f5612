"""Published methods behind the seams of `opd_lightning.interfaces`; what a method adds to them is a file here.

Each comes with a configuration of its name (`--config @quickstart --config @methods/vopd`), a page in docs/methods and
tests/methods/test_<name>.py; tests/methods/test_every_method.py holds all of them to the same promises.
"""

from opd_lightning.methods.antisd import AntiSelfDistillation
from opd_lightning.methods.aopd import ForwardKLWhereNegative
from opd_lightning.methods.brts import BestOfTeacher
from opd_lightning.methods.eopd import EntropyAware
from opd_lightning.methods.iw_opd import RemainingSignal
from opd_lightning.methods.lightning_opd import DebiasedTeacher, Uncorrected
from opd_lightning.methods.mad_opd import MeanOverTeachers
from opd_lightning.methods.minillm import LongReturn
from opd_lightning.methods.opsd import ClippedForwardKL
from opd_lightning.methods.prune_opd import DriftWeights, PruningHorizon
from opd_lightning.methods.reopold import AboveFloorThenUncertain, Floor, RewardFloor
from opd_lightning.methods.ropd import Judge, RubricObjective
from opd_lightning.methods.sdpo import DemonstratedOnly, PeerTeacher, SDPOObjective
from opd_lightning.methods.simct import SimCT
from opd_lightning.methods.sod import StepWeights
from opd_lightning.methods.tip import TIP
from opd_lightning.methods.tropd import AgreementWeight
from opd_lightning.methods.two_contexts import TwoContexts
from opd_lightning.methods.uni_opd import Margin, MarginMask, MarginShift
from opd_lightning.methods.uni_opd_data import BalancedMarks, UpsampledByPasses
from opd_lightning.methods.veto import Veto
from opd_lightning.methods.vopd import KLBaseline

__all__ = [
    "TIP",
    "AboveFloorThenUncertain",
    "AgreementWeight",
    "AntiSelfDistillation",
    "BalancedMarks",
    "BestOfTeacher",
    "ClippedForwardKL",
    "DebiasedTeacher",
    "DemonstratedOnly",
    "DriftWeights",
    "EntropyAware",
    "Floor",
    "ForwardKLWhereNegative",
    "Judge",
    "KLBaseline",
    "LongReturn",
    "Margin",
    "MarginMask",
    "MarginShift",
    "MeanOverTeachers",
    "PeerTeacher",
    "PruningHorizon",
    "RemainingSignal",
    "RewardFloor",
    "RubricObjective",
    "SDPOObjective",
    "SimCT",
    "StepWeights",
    "TwoContexts",
    "Uncorrected",
    "UpsampledByPasses",
    "Veto",
]
