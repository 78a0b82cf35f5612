"""`ToolUse`: responses of several turns, in which a tool answers what the student asks it.

What the tool writes is read by student and teacher like the prompt; it is never scored and never trained on.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from typing_extensions import override

from opd_lightning.interfaces import (
    LiveStudent,
    Problem,
    Prompt,
    Rollout,
    RolloutBatch,
    Sampling,
    StepPrompts,
    Tokenizer,
)
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.answering import closed_text, resolve_stop_ids
from opd_lightning.rollouts.on_policy import OnPolicy


class Tool(ABC):
    """Something that a student may call by writing, and that writes back into its response."""

    @abstractmethod
    def call_ids(self, tokenizer: Tokenizer) -> Sequence[int]:
        """Tokens that may end a call: generation stops after each of them, and the tool is asked."""

    @abstractmethod
    def answer(self, problem: Problem, text: str, seed: int) -> str | None:
        """What the tool writes after the response so far; None where this is no call, and the student goes on.

        Args:
            problem: What the student was asked.
            text: All of the response so far, the tool's own words included.
            seed: Of this turn, for tools that draw something.
        """


@dataclass
class _Response:
    """A response under way."""

    prompt: Prompt
    seed: int
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    finished: bool = False

    def write(self, ids: Sequence[int], log_probs: Sequence[float], *, own: bool) -> None:
        self.ids += ids
        self.log_probs += log_probs
        self.own += [own] * len(ids)


class ToolUse(OnPolicy):
    """The student's current weights answer in turns; between them a tool writes into the response.

    A turn ends where the student closes its response, where the budget is spent, or at a token that may end a call.
    `sampling.max_new_tokens` is the budget of all turns together, the tool's words included. A response without any
    such token is that of `OnPolicy`, bit for bit. Only training uses the tool: held-out problems are answered alone.

    Args:
        tool: Who answers calls.
        max_turns: Turns of a response; the last is not interrupted.

    Raises:
        ValueError: The number is below 1, or no token of the student's can end a call.
    """

    def __init__(self, tool: Tool, max_turns: int = 16) -> None:
        check_at_least(1, "data.source", max_turns=max_turns)
        self.tool = tool
        self.max_turns = max_turns

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        started = time.perf_counter()
        self.engine.sync(student.model, student.weight_version)
        synced = time.perf_counter()
        tokenizer, context = student.spec.tokenizer, student.spec.context_length
        context = min(context, self.engine.context_length or sys.maxsize)
        closing, calling = resolve_stop_ids(tokenizer, sampling), list(self.tool.call_ids(tokenizer))
        if not calling:
            raise ValueError(
                f"data.source.tool: no token of the student's can end a call of {type(self.tool).__name__}. Use"
                " another tool, or OnPolicy."
            )
        responses = [_Response(prompt, seed) for prompt in step.prompts for seed in prompt.seeds]
        with student.autocast(), torch.no_grad():
            for turn in range(self.max_turns):
                live = [each for each in responses if not each.finished and len(each.ids) < sampling.max_new_tokens]
                stops = closing if turn == self.max_turns - 1 else sorted({*closing, *calling})
                for group in _that_fit(live, sampling.max_new_tokens, context):
                    self._take_turn(group, turn, sampling, stops, tokenizer)
                for each in live:
                    each.finished = each.ids[-1] in closing
                    self._let_answer(each, turn, sampling.max_new_tokens, calling, tokenizer)
        rollouts = [_as_rollout(each, tokenizer) for each in responses]
        for rollout in rollouts:
            student.announce(rollout, step.step)
        seconds = {"sync": synced - started, "generate": time.perf_counter() - synced}
        return RolloutBatch(rollouts, self.engine.weight_version, step.step, sampling, seconds)

    def _take_turn(
        self, group: Sequence[_Response], turn: int, sampling: Sampling, stops: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        """Let the student write until each response has come to a stop; what goes beyond its budget is dropped."""
        most = max(sampling.max_new_tokens - len(each.ids) for each in group)
        prompts = [
            Prompt(each.prompt.problem, (*each.prompt.token_ids, *each.ids), (turn_seed(each.seed, turn),))
            for each in group
        ]
        found = self.engine.generate(prompts, replace(sampling, max_new_tokens=most, stop_ids=list(stops)))
        for each, rollout in zip(group, found, strict=True):
            left = sampling.max_new_tokens - len(each.ids)
            each.write(rollout.response_ids[:left].tolist(), rollout.log_probs[:left].tolist(), own=True)

    def _let_answer(
        self, response: _Response, turn: int, budget: int, calling: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        if response.finished or response.ids[-1] not in calling or turn == self.max_turns - 1:
            return
        text = tokenizer.decode(response.ids, skip_special_tokens=False)
        words = self.tool.answer(response.prompt.problem, text, turn_seed(response.seed, turn))
        if words is not None:
            ids = tokenizer.encode(words)[: budget - len(response.ids)]
            response.write(ids, [math.nan] * len(ids), own=False)


def turn_seed(seed: int, turn: int) -> int:
    """Seed of a turn of the response with this seed."""
    return seed if turn == 0 else derive_seed("turn", seed, turn)


def _that_fit(responses: Sequence[_Response], budget: int, context: int) -> list[list[_Response]]:
    """Those that can be continued together, up to the most that one of them may still write; others alone.

    Together or alone, a response is the same: only how far the engine may go differs.
    """
    if not responses:
        return []
    most = max(budget - len(each.ids) for each in responses)
    fits = [len(each.prompt.token_ids) + len(each.ids) + most <= context for each in responses]
    together = [each for each, fit in zip(responses, fits, strict=True) if fit]
    return [group for group in (together, *([each] for each, f in zip(responses, fits, strict=True) if not f)) if group]


def _as_rollout(response: _Response, tokenizer: Tokenizer) -> Rollout:
    own = torch.tensor(response.own, dtype=torch.bool)
    return Rollout(
        problem=response.prompt.problem,
        prompt_ids=torch.tensor(response.prompt.token_ids),
        response_ids=torch.tensor(response.ids),
        log_probs=torch.tensor(response.log_probs, dtype=torch.float32),
        finished=response.finished,
        seed=response.seed,
        text=closed_text(tokenizer, response.ids, response.finished),
        student_wrote=None if bool(own.all()) else own,
    )
