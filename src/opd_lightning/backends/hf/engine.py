"""Rollouts from the live student: no second copy of the weights, nothing to keep in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_lightning.backends.hf.anatomy import causal_lm
from opd_lightning.backends.hf.decoding import NonFiniteLogits, Responses, decode
from opd_lightning.backends.hf.static_decoding import StaticDecoder, check_static
from opd_lightning.interfaces import Blend, Listener, Problem, Prompt, Rollout, RolloutEngine, Sampling, Student
from opd_lightning.interfaces.modes import evaluation_mode
from opd_lightning.rollouts.answering import closed_text, resolve_stop_ids
from opd_lightning.rollouts.prompt_limits import check_room
from opd_lightning.rollouts.sampling import not_finite
from opd_lightning.rollouts.whole_copy import WholeCopy


class HFEngine(RolloutEngine):
    """Generates with the very module that is trained, through its key-value cache.

    `sync` only remembers the module, so a rollout is exactly on-policy at no cost. Rows are sorted by prompt length so
    that little is padded, and cut into batches. A rollout is a function of weights, prompt, sampling and its seed, up
    to the rounding of batched matrix products; the global random state is never used. A student that is cut up over
    processes (`FSDP2Strategy`) cannot be run by one alone: there each process keeps a whole copy to generate with.

    It runs the decoder body of the model itself, so a student with `hidden_states` of its own needs `PlainEngine`.
    Runs in the surrounding autocast context, so enter the one that training uses. Trained weights are cast once per
    call, but frozen float32 weights once per token: give the base of a LoRA student `dtype: bfloat16` under autocast.

    Args:
        max_batch_size: Responses generated at once; bounds the memory of the cache.
        static_shapes: Generate in tensors that never change their shape or address, and look only now and then whether
            all rows have closed. Every batch then has `max_batch_size` rows, which should therefore be what a step
            generates, and attention runs over the whole cache. The step is not compiled.

    Raises:
        ValueError: `max_batch_size` is less than 1.
    """

    def __init__(self, max_batch_size: int = 256, static_shapes: bool = False) -> None:
        if max_batch_size < 1:
            raise ValueError(f"engine.max_batch_size: expected an integer of at least 1, got {max_batch_size}.")
        self.max_batch_size = max_batch_size
        self.blends = not static_shapes
        self._static = StaticDecoder(max_batch_size) if static_shapes else None
        self._student: Student | None = None
        self._model: nn.Module | None = None
        self._device = torch.device("cpu")
        self._whole = WholeCopy()
        self._blend: Blend | None = None

    def setup(self, student: Student, device: torch.device) -> None:
        """Remember how to run the student; it stays on its own device."""
        self._student, self._device = student, device

    def sync(self, model: nn.Module, weight_version: int) -> None:
        """Remember the live module; no weight is copied, unless it is cut up: then all processes copy it together.

        Raises:
            ValueError: It is no transformers model, or none for `static_shapes`.
        """
        if not isinstance(causal_lm(model), PreTrainedModel):
            raise ValueError(
                f"data.engine: HFEngine generates with transformers models, but {type(self._student).__name__} trains a"
                f" {type(model).__name__}. Use PlainEngine, which runs any student."
            )
        assert self._student is not None, "call setup before sync"
        if self._static is not None:
            check_static(model)
        is_current = weight_version == self.weight_version
        self._model = self._whole.of(self._student, model, self._device, is_current=is_current)
        self.weight_version = weight_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        """One rollout per seed of every prompt, in order.

        Raises:
            ValueError: A prompt is empty or leaves no room for the response, or a stop id is no token.
            FloatingPointError: The model gives logits that are not finite.
        """
        assert self._student is not None, "call setup before generate"
        assert self._model is not None, "call sync before generate"
        stop_ids = resolve_stop_ids(self._student.tokenizer, sampling)
        check_room(prompts, sampling, self._student.context_length)
        requests = [(i, seed) for i, prompt in enumerate(prompts) for seed in prompt.seeds]
        by_length = sorted(range(len(requests)), key=lambda k: len(prompts[requests[k][0]].token_ids))
        rollouts: dict[int, Rollout] = {}
        device_type = next(self._model.parameters()).device.type
        with torch.no_grad(), evaluation_mode(self._model), _cached_casts(device_type):
            for start in range(0, len(by_length), self.max_batch_size):
                chunk = by_length[start : start + self.max_batch_size]
                chunk_rollouts = self._respond(prompts, [requests[k] for k in chunk], sampling, stop_ids)
                rollouts.update(zip(chunk, chunk_rollouts, strict=True))
        return [rollouts[k] for k in range(len(requests))]

    @contextmanager
    def blended(self, blend: Blend) -> Iterator[None]:
        """Inside, each token is drawn from the mixture of both models."""
        self._blend = blend
        try:
            yield
        finally:
            self._blend = None

    def close(self) -> None:
        """Let go of the module."""
        self._model = None
        self._whole.forget()
        if self._static is not None:
            self._static.forget()

    def _respond(
        self, prompts: Sequence[Prompt], requests: list[tuple[int, int]], sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[Rollout]:
        """Answer one batch of (prompt index, seed) requests."""
        assert self._student is not None
        assert self._model is not None
        row_of_prompt = {i: row for row, i in enumerate(dict.fromkeys(i for i, _ in requests))}
        prompt_of_row = [row_of_prompt[i] for i, _ in requests]
        token_ids = [prompts[i].token_ids for i in row_of_prompt]
        seeds = [seed for _, seed in requests]
        asked = self._student, self._model, token_ids, prompt_of_row, seeds, sampling, stop_ids
        try:
            if self._static is None:
                responses = decode(*asked, blend=self._blend).cpu()
            else:
                responses = self._static.decode(*asked).cpu()
        except NonFiniteLogits as error:
            uid = prompts[requests[error.row][0]].problem.uid
            raise not_finite(error.position, uid) from error
        prompt_tensors = {i: torch.tensor(prompts[i].token_ids) for i in row_of_prompt}
        return [
            self._rollout(prompts[i].problem, prompt_tensors[i], seed, responses, row)
            for row, (i, seed) in enumerate(requests)
        ]

    def _rollout(self, problem: Problem, prompt_ids: Tensor, seed: int, responses: Responses, row: int) -> Rollout:
        assert self._student is not None
        length = int(responses.lengths[row])
        response_ids = responses.token_ids[row, :length].clone()  # not a view that keeps the whole batch alive
        extras = {} if self._blend is None else {"student_log_prob": responses.own_log_probs[row, :length].clone()}
        return Rollout(
            problem=problem,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            log_probs=responses.log_probs[row, :length].clone(),
            finished=bool(responses.finished[row]),
            seed=seed,
            text=closed_text(self._student.tokenizer, response_ids.tolist(), bool(responses.finished[row])),
            extras=extras,
        )


@contextmanager
def _cached_casts(device_type: str) -> Iterator[None]:
    """Under autocast, cast each trained weight once per call instead of once per token.

    Lightning switches the cache off. It is emptied before, as the weights may have changed, and after, as they will.
    """
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()
