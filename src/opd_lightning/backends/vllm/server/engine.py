"""`VLLMServerEngine`: rollouts from vLLM servers that somebody else started."""

from __future__ import annotations

import secrets
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opd_lightning.backends.vllm.answers import field, read_entry, response_of, scored_tokens
from opd_lightning.backends.vllm.probe import check_same_model, check_tempered_log_probs
from opd_lightning.backends.vllm.requests import (
    CalledOff,
    check_prompts,
    knows_log_probs,
    make_rollout,
    sampling_fields,
    warn_about_cut,
)
from opd_lightning.backends.vllm.server.client import Connection, ServerPool, wait_for
from opd_lightning.backends.vllm.server.exchange import ServerRefusal
from opd_lightning.backends.vllm.server.preflight import ServedModel, check_served_model, find_padding_rows
from opd_lightning.backends.vllm.server.transfer import FileTransfer, WeightTransfer
from opd_lightning.distributed import gather_objects, rank, world_size
from opd_lightning.interfaces import Listener, Prompt, Rollout, RolloutEngine, Sampling, Student, WeightsLost
from opd_lightning.rollouts.answering import resolve_stop_ids

_MOST_ATTEMPTS = 5  # to get all answers of a step from servers with our weights
_READ_VERSION = field("weight_version", str, int, type(None))


class VLLMServerEngine(RolloutEngine):
    """Generates on one or more vLLM servers, which are given the student's weights before.

    Servers on other machines, with vLLM's own data and tensor parallelism, are how a run outgrows one. Every sync
    pushes the weights to all of them (`transfer`), clears their prefix caches and stamps them with a version of this
    run; every generation checks the stamps afterwards, so that answers of a server which was restarted, or which
    another run uses too, are never trained on: they are asked for again after another push. Under DDP and FSDP the
    first process pushes. Requests that are still running when weights are pushed are aborted.

    Start a server with, for example (see docs/vllm.md)::

        VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-1.7B --logprobs-mode processed_logprobs
            --worker-extension-cls opd_lightning.backends.vllm.worker.WorkerExtension
            --weight-transfer-config '{"backend": "opd_lightning"}'

    Seeds, token ids and log-probabilities are as in `VLLMColocatedEngine`. Where the served model has padding rows
    beyond the vocabulary, every request forbids them.

    Args:
        connection: The servers and how patient to be; all serve the student's architecture.
        model: Name under which it is served; None takes the first that the server lists.
        transfer: How weights get there; None is `FileTransfer()`.
        max_mean_mismatch: Largest mean absolute difference in nats between the servers' and the student's
            log-probabilities in the check after the first sync.

    Raises:
        ValueError: A setting is out of range.
    """

    generates_apart = True

    def __init__(
        self,
        connection: Connection,
        model: str | None = None,
        transfer: WeightTransfer | None = None,
        max_mean_mismatch: float = 0.3,
    ) -> None:
        if not max_mean_mismatch > 0:
            raise ValueError(f"engine.max_mean_mismatch: expected a positive number, got {max_mean_mismatch}.")
        self.connection = connection
        self.model = model
        self.transfer = transfer if transfer is not None else FileTransfer()
        self.max_mean_mismatch = max_mean_mismatch
        self._student: Student | None = None
        self._pool: ServerPool | None = None
        self._served: ServedModel | None = None
        self._live: nn.Module | None = None
        self._kept_rows: int | None = None
        self._bias: dict[str, float] = {}
        self._run = ""
        self._syncing_thread = 0
        self._has_warned = False

    def preflight(self, student: Student) -> None:
        """Ask the servers what they serve, and whether they take weights.

        Raises:
            ValueError: Another vocabulary, or no weight-transfer endpoints.
            ServerUnreachable: No answer.
        """
        self._student = student
        if self._pool is not None:
            return
        pool = ServerPool(self.connection, "engine")
        self._served = check_served_model(pool, self.model, student.tokenizer, 0)
        self._run = gather_objects(secrets.token_hex(4))[0]
        for server in pool.servers:
            try:
                pool.ask(server, "/weight_info", read=_READ_VERSION)
            except ServerRefusal as refusal:
                raise ValueError(
                    f"engine: {server.url} has no weight-transfer endpoints ({refusal.reason}). Start it with"
                    " VLLM_SERVER_DEV_MODE=1 in its environment, on a private network."
                ) from refusal
        self._pool = pool

    def setup(self, student: Student, device: torch.device) -> None:
        """Check the servers, if that has not been done."""
        self.preflight(student)

    def knows_log_probs(self, sampling: Sampling) -> bool:
        """Not under a top-p or top-k cut."""
        return knows_log_probs(sampling)

    def sync(self, model: nn.Module, weight_version: int) -> None:
        """Push the student's weights to all servers, unless they have this version.

        Raises:
            ValueError: A server refuses them, or computes something else with them.
            ServerUnreachable: No answer.
        """
        assert self._pool and self._student and self._served, "call setup before sync"
        if self._live is model and weight_version == self.weight_version:
            return
        is_first = self._live is None
        if is_first:
            vocab_size = self._student.tokenizer.vocab_size
            num_rows = len(self._student.head(model).weight)
            self._kept_rows, self._bias = find_padding_rows(self._pool, self._served, num_rows, vocab_size)
        self._live, self.weight_version = model, weight_version
        self._syncing_thread = threading.get_ident()
        try:
            self._push()
            if is_first:
                limit = self.max_mean_mismatch
                check_same_model(self._student, model, self._score_tokens, limit, self._max_model_len, "engine")
                check_tempered_log_probs(self._student, model, self.generate, limit, self._max_model_len)
        except BaseException:  # nothing is known about what the servers have now
            self._live, self.weight_version = None if is_first else model, -1
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        """One rollout per seed of every prompt, in order.

        Raises:
            ValueError: A prompt is empty or too long, a stop id is no token, or a server refuses the request.
            ServerUnreachable: No answer, or a server that has lost its weights and cannot be given them again.
            FloatingPointError: The model gives logits that are not finite.
        """
        assert self._student is not None and self._live is not None, "call setup and sync before generate"
        stop_ids = resolve_stop_ids(self._student.tokenizer, sampling)
        check_prompts(prompts, sampling, self._max_model_len, "the server's --max-model-len")
        if not knows_log_probs(sampling) and not self._has_warned:
            self._has_warned = True
            warn_about_cut(sampling)
        for _ in range(_MOST_ATTEMPTS):
            try:
                rollouts = self._ask_for_rollouts(prompts, sampling, stop_ids, on_rollout)
            except CalledOff:  # in the middle of an answer, by a push of somebody else's or a shutdown
                rollouts = []
            strangers = self._strangers()
            if len(rollouts) == sum(len(prompt.seeds) for prompt in prompts) and not strangers:
                return rollouts
            if strangers:
                self._push_again(strangers)
        raise ConnectionError(
            f"engine: {' and '.join(self.connection.addresses)} lost this run's weights or called its requests off"
            f" {_MOST_ATTEMPTS} times in a row. Another run is using them: give each run servers of its own, and resume"
            " from the last checkpoint."
        )

    def close(self) -> None:
        """Close the connections; the servers go on running."""
        self.transfer.close()
        if self._pool is not None:
            self._pool.close()
        self._pool = self._served = self._live = None
        self.weight_version = -1

    # ------------------------------------------------------------------------------------------------------- internals

    def interrupt(self) -> None:
        """Call off what is waiting for an answer."""
        if self._pool is not None:
            self._pool.close()

    @property
    def context_length(self) -> int | None:
        """The shortest --max-model-len of the servers; None before `preflight`."""
        return None if self._served is None else self._served.max_model_len

    @property
    def _max_model_len(self) -> int:
        assert self._served is not None
        return self._served.max_model_len

    @property
    def _stamp(self) -> str:
        return f"{self._run}:{self.weight_version}"

    def _ask_for_rollouts(
        self, prompts: Sequence[Prompt], sampling: Sampling, stop_ids: Sequence[int], on_rollout: Listener
    ) -> list[Rollout]:
        assert self._pool is not None and self._student is not None and self._served is not None
        futures = []
        for prompt in prompts:
            for seed in prompt.seeds:
                body = sampling_fields(sampling, seed, stop_ids) | {
                    "model": self._served.name,
                    "prompt": list(prompt.token_ids),
                    "return_token_ids": True,
                }
                if self._bias:
                    body["logit_bias"] = self._bias
                read = partial(self._read, prompt, seed, sampling, stop_ids, on_rollout)
                futures.append(self._pool.submit(body, read))
        return wait_for(futures)

    def _read(
        self,
        prompt: Prompt,
        seed: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        on_rollout: Listener,
        choice: Mapping[str, Any],
    ) -> Rollout:
        assert self._student is not None
        token_ids, log_probs = response_of(choice)
        rollout = make_rollout(self._student, prompt, seed, token_ids, log_probs, sampling, stop_ids)
        if on_rollout is not None:
            on_rollout(rollout)
        return rollout

    def _push(self) -> None:
        """Send the live weights; on several processes all read them (shards are gathered) and the first sends."""
        assert self._pool is not None and self._live is not None
        _barrier()  # nobody is generating any more
        if rank() == 0:
            self.transfer.push(self._pool, self._read_weights, self._stamp)
        elif any(hasattr(parameter, "full_tensor") for parameter in self._live.parameters()):
            for _ in self._read_weights():
                pass
        _barrier()

    def _push_again(self, strangers: Sequence[str]) -> None:
        if world_size() > 1 or threading.get_ident() != self._syncing_thread:  # which may be changing the weights now
            raise WeightsLost(
                f"engine: {' and '.join(strangers)} no longer has this run's weights: restarted, or used by"
                " another run. Resume from the last checkpoint."
            )
        warnings.warn(
            f"engine: {' and '.join(strangers)} no longer had this run's weights (restarted, or used by another run);"
            " they are pushed again, and the answers asked for again.",
            stacklevel=3,
        )
        self._push()

    def _strangers(self) -> list[str]:
        """Servers that do not have the weights we gave them."""
        assert self._pool is not None
        pool = self._pool
        versions = pool.on_every_server(lambda server: pool.ask(server, "/weight_info", read=_READ_VERSION))
        return [server.url for server, version in zip(pool.servers, versions, strict=True) if version != self._stamp]

    def _read_weights(self) -> Any:
        assert self._student is not None and self._live is not None
        return self._student.named_weights(self._live, self._kept_rows)

    def _score_tokens(self, token_ids: list[int]) -> list[float]:
        assert self._pool is not None and self._served is not None
        body = {
            "model": self._served.name,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }

        def read(choice: Mapping[str, Any]) -> list[float]:
            entries = scored_tokens(choice, len(token_ids))[1:]
            return [
                read_entry(entry, token_id)[token_id] for token_id, entry in zip(token_ids[1:], entries, strict=True)
            ]

        return self._pool.complete(body, read)


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()
