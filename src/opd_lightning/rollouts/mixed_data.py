"""`MixedData`: the student's own answers now, fixed ones then (arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import override

from opd_lightning.interfaces import (
    LiveStudent,
    Problem,
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutEngine,
    RolloutSource,
    Sampling,
    StepFacts,
    StepPrompts,
    Tokenizer,
)
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.on_policy import OnPolicy

Per = Literal["step", "prompt"]


class MixedData(RolloutSource):
    """Answers of the student with some probability, else fixed ones: a coin is tossed for each step, or each prompt.

    A coin is a function of what it is tossed for, so resuming changes none. With a share of 1 this is `OnPolicy`, with
    0 the fixed source. Problems without fixed answers are refused, or left out, as that source says.

    Args:
        fixed: Gives answers that others wrote: `Stored`.
        student_share: Probability that the student answers.
        per: Whether all prompts of a "step" share one coin, as in the paper's algorithm, or each "prompt" has its own.
        seed: Tosses other coins.

    Raises:
        ValueError: A setting is outside its range, or the fixed source asks the student.

    Source: arXiv 2306.13649, Algorithm 1.
    """

    def __init__(self, fixed: RolloutSource, student_share: float = 0.5, per: Per = "step", seed: int = 0) -> None:
        if not 0 <= student_share <= 1:
            raise ValueError(f"source.student_share: expected a probability in [0, 1], got {student_share}.")
        if per not in ("step", "prompt"):
            raise ValueError(f"source.per: expected step or prompt, got {per!r}.")
        if fixed.asks_engine:
            raise ValueError(
                f"source.fixed: {type(fixed).__name__} has the student answer; expected a source of answers that others"
                " wrote, such as {class_path: Stored, init_args: {path: ...}}."
            )
        self.fixed = fixed
        self.student_share = student_share
        self.per = per
        self.seed = seed
        self._own = OnPolicy()

    asks_engine = True

    @property
    @override
    def staleness(self) -> None:
        return None

    @override
    def setup(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._own.setup(engine)
        self.fixed.setup(engine)

    @override
    def admit(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, sampling: Sampling, num_rollouts: int
    ) -> list[Problem]:
        return self.fixed.admit(problems, tokenizer, sampling, num_rollouts)

    @override
    def knows_log_probs(self, sampling: Sampling) -> bool:
        """Where both do."""
        return self._own.knows_log_probs(sampling) and self.fixed.knows_log_probs(sampling)

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        is_own = [self.asks_student(step.step, prompt) for prompt in step.prompts]
        if self.per == "prompt" and not any(is_own):  # other processes may have the student answer: all sync, or none
            self.engine.sync(student.model, student.weight_version)
        found: dict[bool, list[Rollout]] = {}
        batches: list[RolloutBatch] = []
        for own, source in ((True, self._own), (False, self.fixed)):
            places = [place for place, each in enumerate(is_own) if each is own]
            if not places:
                continue
            part = StepPrompts(
                step.step,
                tuple(step.positions[place] for place in places),
                tuple(step.prompts[place] for place in places),
            )
            batches.append(source.rollouts(part, sampling, student))
            found[own] = batches[-1].rollouts[::-1]  # taken from the end
        rollouts = [found[own].pop() for own, prompt in zip(is_own, step.prompts, strict=True) for _ in prompt.seeds]
        seconds = {name: value for batch in batches for name, value in batch.seconds.items()}
        staleness = 0 if all(is_own) else None
        return RolloutBatch(rollouts, student.weight_version, step.step, sampling, seconds, staleness)

    def asks_student(self, step: int, prompt: Prompt) -> bool:
        """Whether the student answers this prompt of this step."""
        what: tuple[int | str, ...] = (step,) if self.per == "step" else prompt.seeds[:1]
        return derive_seed("mixed data", self.seed, self.per, *what) < self.student_share * 2**63

    @override
    def observe(self, facts: StepFacts) -> None:
        self.fixed.observe(facts)

    @override
    def observe_search(self, factor: float) -> None:
        self.fixed.observe_search(factor)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fixed": self.fixed.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fixed.load_state_dict(state.get("fixed", {}))

    @override
    def close(self) -> None:
        self.fixed.close()
