"""`VLLMServerEngine`: rollouts from vLLM servers that somebody else started."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opd_lightning.backends.vllm_probe import check_same_model, check_tempered_log_probs
from opd_lightning.backends.vllm_requests import (
    check_prompts,
    make_rollout,
    resolve_stop_ids,
    sampling_fields,
    warn_about_cut,
)
from opd_lightning.backends.vllm_server.client import Connection, ServerPool, ServerRefusal, wait_for
from opd_lightning.backends.vllm_server.preflight import ServedModel, check_served_model
from opd_lightning.backends.vllm_server.transfer import FileTransfer, WeightTransfer
from opd_lightning.backends.vllm_weights import folder_weights
from opd_lightning.interfaces import Listener, Prompt, Rollout, RolloutEngine, Sampling, Student, WeightsLost

_MOST_BIASED = 1024  # token ids whose logits a vLLM request may change


class VLLMServerEngine(RolloutEngine):
    """Generates on one or more vLLM servers, which are given the student's weights before.

    Servers on other machines, with vLLM's own data and tensor parallelism, are how a run outgrows one. Every sync
    pushes the weights to all of them (`transfer`), clears their prefix caches and stamps them with a version of this
    run; every generation checks the stamps afterwards, so that answers of a server which was restarted, or which
    another run uses too, are never trained on: they are asked for again after another push. Under DDP and FSDP the
    first process pushes. Requests that are still running when weights are pushed are aborted.

    Start a server with, for example (see docs/vllm.md)::

        VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-1.7B --logprobs-mode processed_logprobs
            --worker-extension-cls opd_lightning.backends.vllm_worker.WorkerExtension
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

    def setup(self, student: Student, device: torch.device) -> None:
        """Ask the servers what they serve, and whether they take weights.

        Raises:
            ValueError: Another vocabulary, or no weight-transfer endpoints.
            ServerUnreachable: No answer.
        """
        self._student = student
        if self._pool is not None:
            return
        self._pool = ServerPool(self.connection, "engine")
        self._served = check_served_model(self._pool, self.model, student.tokenizer, 0)
        self._run = _same_on_all_ranks(secrets.token_hex(4))
        for server in self._pool.servers:
            try:
                self._pool.ask(server, "/weight_info")
            except ServerRefusal as refusal:
                raise ValueError(
                    f"engine: {server.url} has no weight-transfer endpoints ({refusal.reason}). Start it with"
                    " VLLM_SERVER_DEV_MODE=1 in its environment, on a private network."
                ) from refusal

    def sync(self, model: nn.Module, weight_version: int) -> None:
        """Push the student's weights to all servers, unless they have this version.

        Raises:
            ValueError: A server refuses them, or computes something else with them.
            ServerUnreachable: No answer.
        """
        assert self._pool is not None and self._student is not None, "call setup before sync"
        if self._live is model and weight_version == self.weight_version:
            return
        is_first = self._live is None
        if is_first:
            self._look_for_padding_rows(model)
        self._live, self.weight_version = model, weight_version
        self._syncing_thread = threading.get_ident()
        self._push()
        if is_first:
            limit = self.max_mean_mismatch
            check_same_model(self._student, model, self._score_tokens, limit, self._max_model_len, "engine")
            check_tempered_log_probs(self._student, model, self.generate, limit, self._max_model_len)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        """One rollout per seed of every prompt, in order.

        Raises:
            ValueError: A prompt is empty or too long, a stop id is no token, or a server refuses the request.
            ServerUnreachable: No answer, or a server that has lost its weights and cannot be given them again.
            FloatingPointError: The model gives logits that are not finite.
        """
        assert self._student is not None and self._live is not None, "call setup and sync before generate"
        stop_ids = resolve_stop_ids(self._student, sampling)
        check_prompts(prompts, sampling, self._max_model_len, "the server's --max-model-len")
        if sampling.temperature > 0 and not sampling.is_whole_distribution and not self._has_warned:
            self._has_warned = True
            warn_about_cut(sampling)
        while True:
            rollouts = self._ask_for_rollouts(prompts, sampling, stop_ids, on_rollout)
            if not self._strangers():
                return rollouts
            self._push_again()

    def close(self) -> None:
        """Close the connections; the servers go on running."""
        self.transfer.close()
        if self._pool is not None:
            self._pool.close()
        self._pool = self._served = self._live = None
        self.weight_version = -1

    # ------------------------------------------------------------------------------------------------------- internals

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
                futures.append(self._pool.submit("/v1/completions", body, read))
        return wait_for(futures)

    def _read(
        self,
        prompt: Prompt,
        seed: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        on_rollout: Listener,
        answer: Mapping[str, Any],
    ) -> Rollout:
        assert self._student is not None
        choice = answer["choices"][0]
        token_ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        rollout = make_rollout(self._student, prompt, seed, token_ids, log_probs, sampling, stop_ids)
        if on_rollout is not None:
            on_rollout(rollout)
        return rollout

    def _push(self) -> None:
        """Send the live weights; on several processes all read them (shards are gathered) and the first sends."""
        assert self._pool is not None and self._live is not None
        _barrier()  # nobody is generating any more
        if _rank() == 0:
            self.transfer.push(self._pool, self._read_weights, self._stamp)
        elif any(hasattr(parameter, "full_tensor") for parameter in self._live.parameters()):
            for _ in self._read_weights():
                pass
        _barrier()

    def _push_again(self) -> None:
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not is_alone or threading.get_ident() != self._syncing_thread:  # which may be changing the weights now
            raise WeightsLost(
                f"engine: {' and '.join(self._strangers())} no longer has this run's weights: restarted, or used by"
                " another run. Resume from the last checkpoint."
            )
        self._push()

    def _strangers(self) -> list[str]:
        """Servers that do not have the weights we gave them."""
        assert self._pool is not None
        pool = self._pool
        versions = pool.on_every_server(lambda server: pool.ask(server, "/weight_info")["weight_version"])
        return [server.url for server, version in zip(pool.servers, versions, strict=True) if version != self._stamp]

    def _read_weights(self) -> Any:
        assert self._student is not None and self._live is not None
        return folder_weights(self._student, self._live, self._kept_rows)

    def _look_for_padding_rows(self, model: nn.Module) -> None:
        """Find out whether the servers' models have the rows beyond the vocabulary that the student's has."""
        assert self._pool is not None and self._student is not None and self._served is not None
        vocab_size = self._student.tokenizer.vocab_size
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        num_rows = len(embedding.weight)
        self._kept_rows, self._bias = vocab_size, {}
        if num_rows == vocab_size:
            return
        body = {"model": self._served.name, "prompt": [num_rows - 1], "max_tokens": 1}
        try:
            self._pool.post("/v1/completions", body)
        except ServerRefusal:
            return
        self._kept_rows = None
        if num_rows - vocab_size > _MOST_BIASED:
            raise ValueError(
                f"engine: the model has {num_rows - vocab_size} rows beyond the vocabulary, more than a request can"
                f" forbid ({_MOST_BIASED}). Start the servers with --load-format dummy --hf-overrides"
                f" '{{\"vocab_size\": {vocab_size}}}'."
            )
        self._bias = {str(token_id): -100.0 for token_id in range(vocab_size, num_rows)}

    def _score_tokens(self, token_ids: list[int]) -> list[float]:
        assert self._pool is not None and self._served is not None
        body = {
            "model": self._served.name,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        entries = self._pool.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [entry[str(token_id)]["logprob"] for token_id, entry in zip(token_ids[1:], entries[1:], strict=True)]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _same_on_all_ranks(name: str) -> str:
    if not dist.is_initialized():
        return name
    names = [name]
    dist.broadcast_object_list(names, src=0)
    return names[0]
