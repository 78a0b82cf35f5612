"""The EffOPD search on named tensors: direction, candidates, accept or stop (arXiv 2605.11739, section 4.1).

Knows torch and nothing else: no Lightning, no tokenizer, no distillation. `EffOPD` (Lightning callback) and
`EffOPDOptimizer` (any torch loop, `optimizer.py` here) are thin shells around `Extrapolator`.
"""

from opd_lightning.extrapolation.extrapolator import Extrapolator
from opd_lightning.extrapolation.isolation import isolated_rng, undisturbed
from opd_lightning.extrapolation.line_search import Accept, LineSearch, SearchOutcome, Trial
from opd_lightning.extrapolation.low_rank import extrapolate_product
from opd_lightning.extrapolation.rate_search import RateReport, RateSearch
from opd_lightning.extrapolation.rates import peak_rate, scale_rates
from opd_lightning.extrapolation.report import SearchReport
from opd_lightning.extrapolation.schedule import Schedule, ScheduleSpec
from opd_lightning.extrapolation.shards import any_sharded, reshard
from opd_lightning.extrapolation.step_length import ScaledStep, StepLength, find_step_length
from opd_lightning.extrapolation.weights import (
    DEFAULT_LORA_STEP,
    AnchoredWeights,
    LoraStep,
    ParameterFilter,
    check_device,
    select_parameters,
)

__all__ = [
    "DEFAULT_LORA_STEP",
    "Accept",
    "AnchoredWeights",
    "Extrapolator",
    "LineSearch",
    "LoraStep",
    "ParameterFilter",
    "RateReport",
    "RateSearch",
    "ScaledStep",
    "Schedule",
    "ScheduleSpec",
    "SearchOutcome",
    "SearchReport",
    "StepLength",
    "Trial",
    "any_sharded",
    "check_device",
    "extrapolate_product",
    "find_step_length",
    "isolated_rng",
    "peak_rate",
    "reshard",
    "scale_rates",
    "select_parameters",
    "undisturbed",
]
