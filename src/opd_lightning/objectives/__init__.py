"""Pure maths of the objective: log-probabilities, divergences, supports, weightings, estimators, and their statistics.

Depends on torch and on the interfaces only. `Objective` joins the factors; `sum_over_chunks` applies it to many tokens.
"""

from opd_lightning.objectives.chunking import ChunkedLoss, sum_over_chunks
from opd_lightning.objectives.dense_scores import DenseScores
from opd_lightning.objectives.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from opd_lightning.objectives.logprobs import entropy, full_log_probs, log_probs_at, top_log_probs
from opd_lightning.objectives.objective import Objective
from opd_lightning.objectives.statistics import TokenStatistics, token_statistics

__all__ = [
    "ChunkedLoss",
    "DenseScores",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "Objective",
    "ReverseKL",
    "TokenStatistics",
    "entropy",
    "full_log_probs",
    "log_probs_at",
    "sum_over_chunks",
    "token_statistics",
    "top_log_probs",
]
