"""The words (`words.py`) and the seams (`seams.py`) of the project.

Legend of shapes, used in every docstring: B rollouts, L padded sequence length, T response tokens of one rollout,
N response tokens of a micro-batch laid end to end, K compared tokens, V vocabulary, H hidden size.
"""

from opd_lightning.interfaces.seams import (
    PromptOutcome,
    PromptSelector,
    RolloutEngine,
    Score,
    Student,
    Task,
    Teacher,
    TeacherScores,
    Tokenizer,
    WeightsLost,
)
from opd_lightning.interfaces.words import (
    Listener,
    Message,
    MicroBatch,
    Problem,
    Prompt,
    PromptBatch,
    Rollout,
    RolloutBatch,
    Sampling,
    ScoreRequest,
    Split,
)

__all__ = [
    "Listener",
    "Message",
    "MicroBatch",
    "Problem",
    "Prompt",
    "PromptBatch",
    "PromptOutcome",
    "PromptSelector",
    "Rollout",
    "RolloutBatch",
    "RolloutEngine",
    "Sampling",
    "Score",
    "ScoreRequest",
    "Split",
    "Student",
    "Task",
    "Teacher",
    "TeacherScores",
    "Tokenizer",
    "WeightsLost",
]
