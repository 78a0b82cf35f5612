"""What a diagnosis measures: plain numbers, and nothing that computes. None is what could not be known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean of marks or of their differences, with its standard error.

    Attributes:
        value: The mean.
        error: Standard error over prompts; None with fewer than two.
        num_prompts: Prompts behind it.
    """

    value: float
    error: float | None
    num_prompts: int

    @property
    def margin(self) -> float:
        """Two standard errors; where all values are the same, 3 over the number of prompts (the rule of three)."""
        if self.error is None:
            return math.inf
        return 2 * self.error if self.error > 0 else 3 / self.num_prompts

    @property
    def lower(self) -> float:
        """The mean less the margin."""
        return self.value - self.margin

    @property
    def upper(self) -> float:
        """The mean and the margin."""
        return self.value + self.margin


@dataclass(frozen=True)
class AnswerFacts:
    """What the answers of one model to all prompts say.

    Attributes:
        accuracy: Mean reward; None where the task marks nothing.
        mixed_prompts: Share of prompts with both a right (reward 1) and a not right answer, which is what
            reinforcement learning needs; None where nothing is marked or each prompt was answered once.
        response_length: Tokens, the closing one included.
        truncation_rate: Share of answers cut at `max_new_tokens`.
        repetition_rate: Share of an answer's 8-grams that occurred earlier in it; mean over answers.
    """

    accuracy: Estimate | None
    mixed_prompts: float | None
    response_length: float
    truncation_rate: float
    repetition_rate: float


@dataclass(frozen=True)
class PositionBin:
    """Means over the response tokens at positions first..last (0-based, both included).

    Attributes:
        first: First position.
        last: Last position.
        num_tokens: Tokens there.
        facts: Mean of each fact over the tokens where it is defined, by name (docs/metrics.md).
    """

    first: int
    last: int
    num_tokens: int
    facts: Mapping[str, float | None]


@dataclass(frozen=True)
class Continuation:
    """The teacher goes on where the student's answers were cut.

    Attributes:
        depth: Tokens of the student's answer that were kept; 0 is the teacher's own answer.
        num_rollouts: Answers that are longer than this.
        student: Accuracy of these answers as the student ended them.
        teacher: Accuracy of the same answers ended by the teacher.
        gain: Difference of the two, paired.
    """

    depth: int
    num_rollouts: int
    student: float
    teacher: float
    gain: Estimate


@dataclass(frozen=True)
class LossGradient:
    """Gradients of one loss on the same rollouts, g_i the one of rollout i (sum over its tokens).

    Attributes:
        loss: Its name.
        k: Size of its support; None for losses without a list.
        norm: ‖Σ g_i‖ over the number of tokens: the gradient norm of a step on these rollouts.
        coherence: ‖Σ g_i‖ / Σ ‖g_i‖: 1 where all agree, about 1/√n where they have nothing in common.
        signal: Unbiased estimate of ‖E g‖² / E ‖g‖²; below 0 where there are too few rollouts to see any.
        cosine: Of Σ g_i with that of the full-vocabulary reverse KL; None where that is not known.
        variance: Σ ‖g_i − ḡ‖² relative to that of the full-vocabulary reverse KL.
        error: Σ ‖g_i − f_i‖² / Σ ‖f_i‖² with f_i the full-vocabulary gradients.
    """

    loss: str
    k: int | None
    norm: float
    coherence: float
    signal: float
    cosine: float | None
    variance: float | None
    error: float | None

    @property
    def noise_scale(self) -> float | None:
        """Rollouts at which signal and noise of their mean gradient are equal (arXiv 1812.06162); None if unknown."""
        return 1 / self.signal - 1 if self.signal > 0 else None


@dataclass(frozen=True)
class Gradients:
    """Gradients of several losses on the same rollouts.

    Attributes:
        num_rollouts: One of each prompt, as those of a prompt are not independent.
        num_weights: Weights that are trained.
        num_kept: Weights, drawn evenly from them, that the numbers are taken over.
        losses: The run's own objective first.
    """

    num_rollouts: int
    num_weights: int
    num_kept: int
    losses: tuple[LossGradient, ...]


@dataclass(frozen=True)
class Alignment:
    """Cosines of the distillation gradient with that of the expected reward, at single tokens (`alignment.py`).

    Attributes:
        num_nodes: Tokens that were looked at.
        num_informative: Those at which the cosine is defined: some candidates lead to right answers more often than
            others, and the teacher differs from the student.
        cosine: Mean over these; None without any.
        after_right: Mean over those in right answers.
        after_wrong: Mean over those in others.
    """

    num_nodes: int
    num_informative: int
    cosine: Estimate | None
    after_right: Estimate | None
    after_wrong: Estimate | None


@dataclass(frozen=True)
class Quantization:
    """A quantised teacher beside the same one in full, on the student's answers.

    Attributes:
        kl: KL(in full || quantised), nats per token.
        largest: Of any token.
        agreement: Share of tokens at which both find the same token likeliest.
        num_tokens: Tokens that were compared.
    """

    kl: Estimate
    largest: float
    agreement: float
    num_tokens: int


@dataclass(frozen=True)
class RenderedPrompt:
    """One problem as both sides render it.

    Attributes:
        uid: Which problem.
        student: The prompt as the student's template makes it: what both models read in training.
        teacher: As the teacher's own template would make it; None where there is none at hand.
        num_different: Of all prompts, how many render to other token ids; None likewise.
    """

    uid: str
    student: str
    teacher: str | None
    num_different: int | None


@dataclass(frozen=True)
class TemplateNumbers:
    """One way of putting the problems, measured on the same problems as every other.

    Attributes:
        name: In tables.
        settings: What makes a run put them so, nested as in its YAML; empty for the run as it is.
        example: The first problem, rendered.
        by_prompt: Columns of `prompt_rows.PROMPT_NUMBERS`, one entry per problem; None where it is not known.
    """

    name: str
    settings: Mapping[str, Any]
    example: str
    by_prompt: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Diagnosis:
    """A pair, measured.

    Attributes:
        settings: What was asked for: models, task, prompts, seed, sampling.
        num_prompts: Different prompts.
        num_rollouts: Answers of the student.
        num_tokens: Response tokens that were compared.
        vocab_size: V.
        k: Size of the top-k lists of the facts.
        facts: Mean of each fact over all response tokens, by name (docs/metrics.md).
        student: Answers of the student.
        teacher: Answers of the teacher to the very same prompts; None where this process cannot run it.
        teacher_own_template: Its answers to prompts made with its own template, where that differs.
        reward_auroc: Probability that a right answer has a higher mean of log q(y) - log p(y) than one that is not
            right; None without both kinds.
        num_right: Answers of the student that are fully right.
        positions: By position in the response.
        continuations: By depth.
        gradients: Of several losses.
        prompt: One prompt as both sides render it.
        findings: What is worth knowing about tokenizers and templates.
        left_out: What could not be measured, and why.
        prompts: What each prompt showed (`prompt_rows`).
        templates: The run's own template and others beside it; empty where no others were asked for.
        alignment: With the gradient of the expected reward; None where it was not asked for, or cannot be known.
        quantization: What it changes of the teacher; None where that is not quantised, or the other does not fit.
    """

    settings: Mapping[str, Any]
    num_prompts: int
    num_rollouts: int
    num_tokens: int
    vocab_size: int
    k: int
    facts: Mapping[str, float | None]
    student: AnswerFacts
    teacher: AnswerFacts | None
    teacher_own_template: AnswerFacts | None
    reward_auroc: float | None
    num_right: int | None
    positions: tuple[PositionBin, ...]
    continuations: tuple[Continuation, ...]
    gradients: Gradients
    prompt: RenderedPrompt
    findings: tuple[str, ...]
    left_out: tuple[str, ...]
    prompts: tuple[Mapping[str, Any], ...] = ()
    templates: tuple[TemplateNumbers, ...] = ()
    alignment: Alignment | None = None
    quantization: Quantization | None = None
