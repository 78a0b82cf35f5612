"""`PlainEngine`: rollouts from any student that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from typing_extensions import override

from opd_lightning.interfaces import Listener, Prompt, Rollout, RolloutEngine, Sampling, Student
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.randomness import hashed_uniforms
from opd_lightning.rollouts.answering import closed_text, resolve_stop_ids
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.prompt_limits import check_room
from opd_lightning.rollouts.sampling import draw_tokens, not_finite
from opd_lightning.rollouts.whole_copy import WholeCopy


class PlainEngine(RolloutEngine):
    """Generates with the live student through `Student.hidden_states` and `head` alone, without a cache.

    Every token runs the whole sequence again, so time grows with the square of the length: for models that transformers
    does not know, and for tests. Exactly on-policy; a rollout is a function of weights, prompt, sampling and its seed,
    up to the rounding of batched matrix products.

    Args:
        max_batch_size: Responses generated at once.

    Raises:
        ValueError: The number is below 1.
    """

    def __init__(self, max_batch_size: int = 256) -> None:
        check_at_least(1, "engine", max_batch_size=max_batch_size)
        self.max_batch_size = max_batch_size
        self._student: Student | None = None
        self._model: nn.Module | None = None
        self._device = torch.device("cpu")
        self._whole = WholeCopy()

    @override
    def setup(self, student: Student, device: torch.device) -> None:
        self._student, self._device = student, device

    @override
    def sync(self, model: nn.Module, weight_version: int) -> None:
        assert self._student is not None, "call setup before sync"
        is_current = weight_version == self.weight_version
        self._model = self._whole.of(self._student, model, self._device, is_current=is_current)
        self.weight_version = weight_version

    @override
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        assert self._student is not None and self._model is not None, "call setup and sync before generate"
        stop_ids = resolve_stop_ids(self._student.tokenizer, sampling)
        check_room(prompts, sampling, self._student.context_length)
        none = torch.zeros(0)
        blank = [
            Rollout(prompt.problem, torch.tensor(prompt.token_ids), none.long(), none, finished=False, seed=seed)
            for prompt in prompts
            for seed in prompt.seeds
        ]
        rollouts: list[Rollout] = []
        with torch.no_grad(), evaluation_mode(self._model):
            for start in range(0, len(blank), self.max_batch_size):
                rollouts += self._respond(blank[start : start + self.max_batch_size], sampling, stop_ids)
        if on_rollout is not None:
            for rollout in rollouts:
                on_rollout(rollout)
        return rollouts

    def _respond(self, rollouts: list[Rollout], sampling: Sampling, stop_ids: list[int]) -> list[Rollout]:
        assert self._student is not None and self._model is not None
        tokenizer, device = self._student.tokenizer, next(self._model.parameters()).device
        for position in range(sampling.max_new_tokens):
            live = [i for i, rollout in enumerate(rollouts) if not rollout.finished]
            if not live:
                break
            # a place to fill, so that the state that predicts it is asked for
            asked = [_with_token(rollouts[i], tokenizer.pad_id, 0.0, False) for i in live]
            batch = collate(asked, tokenizer.pad_id).to(device)
            last = torch.tensor([len(rollout.response_ids) for rollout in asked], device=device).cumsum(0) - 1
            hidden = self._student.hidden_states(self._model, batch)[last]
            seeds = torch.tensor([rollouts[i].seed for i in live], device=device)
            uniforms = hashed_uniforms(seeds, position)
            token_ids, log_probs = draw_tokens(self._student.head(self._model)(hidden), uniforms, sampling)
            if broken := (~log_probs.isfinite()).nonzero().flatten().tolist():
                raise not_finite(position, rollouts[live[broken[0]]].problem.uid)
            for i, token_id, log_prob in zip(live, token_ids.tolist(), log_probs.tolist(), strict=True):
                rollouts[i] = _with_token(rollouts[i], token_id, log_prob, token_id in stop_ids)
        return [
            replace(rollout, text=closed_text(tokenizer, rollout.response_ids.tolist(), rollout.finished))
            for rollout in rollouts
        ]

    @override
    def close(self) -> None:
        self._model = None
        self._whole.forget()


def _with_token(rollout: Rollout, token_id: int, log_prob: float, finished: bool) -> Rollout:
    return replace(
        rollout,
        response_ids=torch.cat([rollout.response_ids, torch.tensor([token_id])]),
        log_probs=torch.cat([rollout.log_probs, torch.tensor([log_prob])]),
        finished=finished,
    )
