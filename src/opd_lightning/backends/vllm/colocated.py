"""`VLLMColocatedEngine`: rollouts from a vLLM that lives in the training process, or in a child of it.

vLLM is imported by `preflight`, not before.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_lightning.backends.vllm.placement import (
    engine_defaults,
    environment,
    launcher_variables,
    left_alone,
    process_group_kept,
    visible_devices,
)
from opd_lightning.backends.vllm.probe import check_same_model
from opd_lightning.backends.vllm.requests import (
    check_prompts,
    knows_log_probs,
    make_rollout,
    run_to_the_end,
    sampling_fields,
    warn_about_cut,
)
from opd_lightning.backends.vllm.weights import hand_over
from opd_lightning.interfaces import Listener, Prompt, Rollout, RolloutEngine, Sampling, Student
from opd_lightning.rollouts.answering import resolve_stop_ids

_OURS = ("model", "tokenizer", "load_format", "skip_tokenizer_init", "worker_extension_cls", "weight_transfer_config")
_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class VLLMColocatedEngine(RolloutEngine):
    """Generates with vLLM on the training device, with weights taken over from the live student.

    The first `sync` starts vLLM on the student's configuration alone; every sync then hands over the weights through
    vLLM's weight-transfer interface (adapters merged out of place, padding rows of the vocabulary cut off) and clears
    the prefix cache. In this process they are passed by reference and copied once. A `sync` of the version that vLLM
    already has does nothing: whoever changes weights outside the optimiser must raise it (`on_weights_moved`).

    After the first sync vLLM and the student score the same tokens, and the engine refuses to go on if they disagree.
    Log-probabilities are those of the tempered distribution (`logprobs_mode: processed_logprobs`); under a top-p or
    top-k cut they are not known and NaN. A rollout is a function of weights, prompt, sampling and its seed up to the
    rounding of batched matrix products; the draws differ from `HFEngine`'s. The global random state, torch's thread
    settings and autocast are left alone.

    Under DDP every process has its own engine.

    Args:
        engine_args: Arguments of `vllm.LLM`, for example gpu_memory_utilization, max_model_len, enforce_eager,
            quantization, kv_cache_dtype. Where not given: dtype is bfloat16 on a GPU and float32 on a CPU,
            max_model_len the student's context, gpu_memory_utilization 0.4 (the rest is for training), and on a CPU
            prompts are prefilled whole and block_size is 32.
        sleep: Give vLLM's GPU memory back between generations: its weights wait in CPU memory, its cache is dropped.
        own_process: Run vLLM in a child process; weights then go through a file in shared memory. Always so with
            `devices`, and with tensor_parallel_size or pipeline_parallel_size above 1.
        devices: GPUs of the child process, as the training process counts them, for example [1] to generate on the
            second GPU while training on the first. None is the training device, or all when vLLM wants several.
        max_mean_mismatch: Largest mean absolute difference in nats between both models' log-probabilities in the
            check after the first sync; None is 0.01 in float32 and 0.3 in half precision or quantised.

    Raises:
        ValueError: An argument that the engine decides itself, or that contradicts another.
    """

    def __init__(
        self,
        engine_args: dict[str, Any] | None = None,
        sleep: bool = False,
        own_process: bool = False,
        devices: list[int] | None = None,
        max_mean_mismatch: float | None = None,
    ) -> None:
        engine_args = dict(engine_args or {})
        if taken := sorted(set(engine_args) & {*_OURS, "logprobs_mode", "enable_sleep_mode"}):
            raise ValueError(
                f"engine.engine_args: {', '.join(taken)} is decided by the engine, which hands vLLM the live student's"
                " weights. Leave it out (sleep mode: engine.sleep)."
            )
        if max_mean_mismatch is not None and not max_mean_mismatch > 0:
            raise ValueError(f"engine.max_mean_mismatch: expected a positive number, got {max_mean_mismatch}.")
        self.engine_args: Mapping[str, Any] = engine_args
        self.sleep = sleep
        self.num_shards = engine_args.get("tensor_parallel_size", 1) * engine_args.get("pipeline_parallel_size", 1)
        if devices is not None and len(devices) != self.num_shards:
            raise ValueError(
                f"engine.devices: expected {self.num_shards} GPUs (tensor_parallel_size x pipeline_parallel_size), got"
                f" {devices}."
            )
        self.own_process = own_process or devices is not None or self.num_shards > 1
        self.generates_apart = self.own_process
        self.devices = devices
        self.max_mean_mismatch = max_mean_mismatch
        self._student: Student | None = None
        self._device = torch.device("cpu")
        self._llm: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._asleep = self._is_checked = False
        self._owns_process_group = False
        self._has_warned = False
        self._interrupted = threading.Event()
        self._turn = threading.Lock()  # in one process vLLM serves one thread at a time

    @property
    def context_length(self) -> int | None:
        """Most tokens (prompt + response) that vLLM takes; None is what the student takes."""
        return self.engine_args.get("max_model_len")

    @property
    def max_model_len(self) -> int:
        """Most tokens (prompt + response) that vLLM takes."""
        assert self._student is not None, "call setup first"
        return self.context_length or self._student.context_length

    def knows_log_probs(self, sampling: Sampling) -> bool:
        """Not under a top-p or top-k cut."""
        return knows_log_probs(sampling)

    def preflight(self, student: Student) -> None:
        """Make sure that vLLM is there.

        Raises:
            ValueError: vLLM is not installed.
        """
        try:
            import vllm  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"engine: VLLMColocatedEngine needs vLLM ({error}). Install it (pip install 'opd-lightning[vllm]'), or"
                " use HFEngine."
            ) from error

    def setup(self, student: Student, device: torch.device) -> None:
        """Remember the student; vLLM starts with the first `sync`, which has its configuration."""
        self.preflight(student)
        self._student, self._device = student, device
        self._interrupted.clear()

    def sync(self, model: nn.Module, weight_version: int) -> None:
        """Hand the student's weights to vLLM, unless it has this version.

        Raises:
            ValueError: vLLM cannot run this model, or computes something else with its weights.
        """
        assert self._student is not None, "call setup before sync"
        if self._llm is not None and weight_version == self.weight_version:
            return
        with self._turn, left_alone(self._device):
            if self._llm is None:
                self._start(model)
            self._wake()
            self._transfer(model, weight_version)
            if not self._is_checked:
                limit = self._tolerance
                check_same_model(self._student, model, self._score_tokens, limit, self.max_model_len, "engine")
                self._is_checked = True
            self.weight_version = weight_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_rollout: Listener = None) -> list[Rollout]:
        """One rollout per seed of every prompt, in order.

        Raises:
            ValueError: A prompt is empty or too long, or a stop id is no token.
            FloatingPointError: The model gives logits that are not finite.
        """
        assert self._llm and self._student, "call setup and sync before generate"
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        stop_ids = resolve_stop_ids(self._student.tokenizer, sampling)
        check_prompts(prompts, sampling, self.max_model_len, "engine.engine_args.max_model_len")
        if not knows_log_probs(sampling) and not self._has_warned:
            self._has_warned = True
            warn_about_cut(sampling)
        requests = [(prompt, seed) for prompt in prompts for seed in prompt.seeds]
        rollouts: dict[int, Rollout] = {}

        def read(i: int, answer: Any) -> None:
            assert self._student is not None
            log_probs = answer.logprobs.logprobs if answer.logprobs else []
            rollouts[i] = make_rollout(self._student, *requests[i], answer.token_ids, log_probs, sampling, stop_ids)
            if on_rollout is not None:
                on_rollout(rollouts[i])

        # what random state and threads a child has is its own; here another thread may be training meanwhile
        with self._turn, nullcontext() if self.own_process else left_alone(self._device):
            self._wake()
            engine = self._llm.llm_engine
            for i, (prompt, seed) in enumerate(requests):
                params = SamplingParams(
                    **sampling_fields(sampling, seed, stop_ids),
                    detokenize=False,
                    flat_logprobs=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(i), TokensPrompt(prompt_token_ids=list(prompt.token_ids)), params)
            run_to_the_end(engine, len(requests), read, self._interrupted)
            if self.sleep:
                self._llm.sleep(level=1)
                self._asleep = True
        return [rollouts[i] for i in range(len(requests))]

    def interrupt(self) -> None:
        """Call off what is being generated, within one step of vLLM's."""
        self._interrupted.set()

    def close(self) -> None:
        """Shut vLLM down and give its memory back."""
        if self._llm is not None:
            with left_alone(self._device), process_group_kept(not self._owns_process_group):
                self._llm.llm_engine.engine_core.shutdown()
                self._llm = None
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._asleep = self._is_checked = False
        self.weight_version = -1

    # ------------------------------------------------------------------------------------------------------- internals

    def _start(self, model: nn.Module) -> None:
        from vllm import LLM

        assert self._student is not None
        self._folder = tempfile.TemporaryDirectory(prefix="opd_lightning_blank_")
        self._student.write_blank(model, Path(self._folder.name), self._student.tokenizer.vocab_size)
        defaults = engine_defaults(self._device, self.max_model_len)
        # left to itself the CPU build pins its threads, and with them the training's, to the first cores
        variables = {_IN_PROCESS: "1" if self.own_process else "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if self.own_process:
            variables |= visible_devices(self._device, self.devices, self.num_shards)
        else:
            arguments, place = launcher_variables(self._device)
            defaults |= arguments
            variables |= place
        self._owns_process_group = not torch.distributed.is_initialized()
        logging.getLogger("vllm.renderers").setLevel(logging.ERROR)  # it misses the tokenizer, which nobody needs
        with environment(variables):
            try:
                self._llm = LLM(
                    **(defaults | dict(self.engine_args)),
                    model=self._folder.name,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    logprobs_mode="processed_logprobs",
                    enable_sleep_mode=self.sleep,
                    worker_extension_cls="opd_lightning.backends.vllm.worker.WorkerExtension",
                    weight_transfer_config={"backend": "opd_lightning"},
                )
            except TypeError as error:
                raise ValueError(f"engine.engine_args: {error}. Expected arguments of vllm.LLM.") from error
        self._llm.init_weight_transfer_engine({"init_info": {}})

    def _transfer(self, model: nn.Module, weight_version: int) -> None:
        assert self._student is not None
        weights = self._student.named_weights(model, self._student.tokenizer.vocab_size)
        hand_over(self._llm, weights, weight_version, file_dtype=self._dtype if self.own_process else None)

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _score_tokens(self, token_ids: list[int]) -> list[float]:
        """Log-probability of every token but the first, untempered."""
        from vllm import SamplingParams, TokensPrompt

        output = self._llm.generate(
            [TokensPrompt(prompt_token_ids=token_ids)],
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )[0]
        return [entry[i].logprob for i, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._llm.llm_engine.model_config.dtype
        return dtype

    @property
    def _tolerance(self) -> float:
        if self.max_mean_mismatch is not None:
            return self.max_mean_mismatch
        is_exact = self._dtype == torch.float32 and not self.engine_args.get("quantization")
        return 0.01 if is_exact else 0.3
