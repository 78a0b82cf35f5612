"""The words of the project and its seams: what may be replaced, one abstract class each. Imports torch only.

Legend of shapes, used in every docstring: B rollouts, L padded sequence length, T response tokens of one rollout,
N response tokens of a micro-batch laid end to end, K compared tokens, V vocabulary, H hidden size.
"""

from opd_lightning.interfaces.generation import (
    Blend,
    LiveStudent,
    RolloutEngine,
    RolloutSource,
    StepFacts,
    TrainedRollout,
    WeightsLost,
)
from opd_lightning.interfaces.learning import Advantage, Normalizer, Objective, TokenWeighting
from opd_lightning.interfaces.models import Student, Teacher, Tokenizer
from opd_lightning.interfaces.problems import PromptOutcome, PromptSelector, Score, Task
from opd_lightning.interfaces.scores import TeacherScores
from opd_lightning.interfaces.tokens import LinearHead, MicroBatch, ResponseTokens, ScoreRequest
from opd_lightning.interfaces.words import (
    Listener,
    Message,
    Problem,
    Prompt,
    PromptBatch,
    Rollout,
    RolloutBatch,
    RoundPart,
    Sampling,
    Split,
    StepPrompts,
)

__all__ = [
    "Advantage",
    "Blend",
    "LinearHead",
    "Listener",
    "LiveStudent",
    "Message",
    "MicroBatch",
    "Normalizer",
    "Objective",
    "Problem",
    "Prompt",
    "PromptBatch",
    "PromptOutcome",
    "PromptSelector",
    "ResponseTokens",
    "Rollout",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutSource",
    "RoundPart",
    "Sampling",
    "Score",
    "ScoreRequest",
    "Split",
    "StepFacts",
    "StepPrompts",
    "Student",
    "Task",
    "Teacher",
    "TeacherScores",
    "TokenWeighting",
    "Tokenizer",
    "TrainedRollout",
    "WeightsLost",
]
