"""Pure maths of what is minimised: log-probabilities, divergences, supports, estimators, and the facts of tokens.

Depends on torch and on the interfaces only. `DivergenceObjective`, `SampledTokenObjective` and `NLL` join the factors;
`compare_in_chunks` applies one of them to many tokens; `gradients.py` has what it knows of their gradients.
"""

from opd_lightning.objectives.chunks import TokenResults, compare_in_chunks
from opd_lightning.objectives.dense_scores import DenseScores
from opd_lightning.objectives.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from opd_lightning.objectives.estimators import CandidateScore, Direct, Estimator
from opd_lightning.objectives.facts import known_facts, token_facts
from opd_lightning.objectives.group_reward import GroupReward
from opd_lightning.objectives.hidden_scores import HiddenScores
from opd_lightning.objectives.joint_scores import JointScores
from opd_lightning.objectives.likelihood import NLL
from opd_lightning.objectives.listed_scores import ListedScores
from opd_lightning.objectives.logprobs import entropy, full_log_probs, log_probs_at
from opd_lightning.objectives.objective import DivergenceObjective
from opd_lightning.objectives.sampled_token import Clipped, Importance, Masked, SampledTokenObjective, Truncated
from opd_lightning.objectives.student_scores import ScoreObjective, StudentScores
from opd_lightning.objectives.supports import (
    FullVocabulary,
    Intersection,
    SampledToken,
    StudentTopK,
    Support,
    SymmetricDifference,
    TeacherTopK,
    Union,
)
from opd_lightning.objectives.token_weightings import EntropyWeights, PositionWeights

__all__ = [
    "NLL",
    "CandidateScore",
    "Clipped",
    "DenseScores",
    "Direct",
    "Divergence",
    "DivergenceObjective",
    "EntropyWeights",
    "Estimator",
    "ForwardKL",
    "FullVocabulary",
    "GroupReward",
    "HiddenScores",
    "Importance",
    "Intersection",
    "JensenShannon",
    "JointScores",
    "ListedScores",
    "Masked",
    "PositionWeights",
    "ReverseKL",
    "SampledToken",
    "SampledTokenObjective",
    "ScoreObjective",
    "StudentScores",
    "StudentTopK",
    "Support",
    "SymmetricDifference",
    "TeacherTopK",
    "TokenResults",
    "Truncated",
    "Union",
    "compare_in_chunks",
    "entropy",
    "full_log_probs",
    "known_facts",
    "log_probs_at",
    "token_facts",
]
