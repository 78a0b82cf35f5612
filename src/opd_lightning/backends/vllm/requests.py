"""What a vLLM engine is asked, in the process or over HTTP, and what its answers become.

vLLM is given token ids and gives token ids; which token closes a response is said explicitly, so that no generation
config of a model folder adds anything.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opd_lightning.backends.vllm.answers import check_response
from opd_lightning.interfaces import Prompt, Rollout, Sampling, Student
from opd_lightning.rollouts.answering import closed_text

_LEAST_TEMPERATURE = 0.01  # vLLM raises smaller ones to this


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, max_model_len: int, setting: str) -> None:
    """Make sure that every prompt leaves room for a whole response.

    Args:
        prompts: What is asked.
        sampling: Says how long a response may get.
        max_model_len: Most tokens (prompt + response) that vLLM takes.
        setting: What to raise when it is too small.

    Raises:
        ValueError: A prompt is empty or too long.
    """
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(
                f"problem {prompt.problem.uid!r}: the prompt is empty. Check its messages and the template."
            )
        if len(prompt.token_ids) + sampling.max_new_tokens > max_model_len:
            raise ValueError(
                f"problem {prompt.problem.uid!r}: {len(prompt.token_ids)} prompt tokens and"
                f" sampling.max_new_tokens={sampling.max_new_tokens} do not fit into vLLM's {max_model_len} tokens."
                f" Raise {setting}, lower max_new_tokens, or leave long prompts out."
            )


def sampling_fields(sampling: Sampling, seed: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """One request's sampling parameters, by the names that vLLM uses in Python and over HTTP.

    Everything is said explicitly: what is left out, a server takes from the model's generation config.

    Raises:
        ValueError: vLLM would silently use another temperature.
    """
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        raise ValueError(
            f"sampling.temperature: vLLM takes 0 (greedy) or at least {_LEAST_TEMPERATURE}, got {sampling.temperature}."
        )
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # only the ids above close a response
        "logprobs": 0,  # of the sampled token alone
    }


class CalledOff(ConnectionError):
    """vLLM stopped answering in the middle of a response: it is shutting down, or somebody changes its weights."""


def make_rollout(
    student: Student,
    prompt: Prompt,
    seed: int,
    token_ids: Sequence[int],
    log_probs: Sequence[float],
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> Rollout:
    """Turn vLLM's answer to one request into a rollout.

    vLLM normalises log-probabilities after any top-p or top-k cut. Those before it are not known then, and NaN.

    Raises:
        UnfitAnswer: The answer contradicts the question.
        CalledOff: The response neither ends nor is as long as it may be.
        FloatingPointError: The model gives logits that are not finite.
    """
    check_response(
        token_ids,
        log_probs,
        vocab_size=student.tokenizer.vocab_size,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=stop_ids,
    )
    finished = len(token_ids) > 0 and token_ids[-1] in stop_ids
    if not finished and len(token_ids) < sampling.max_new_tokens:
        raise CalledOff(
            f"engine: vLLM stopped after {len(token_ids)} of {sampling.max_new_tokens} tokens of a response. It was"
            " told to shut down, or its requests were called off. Resume from the last checkpoint."
        )
    if not all(map(math.isfinite, log_probs)):
        raise FloatingPointError(
            f"The student's logits are not finite for problem {prompt.problem.uid!r}. Check that its weights are finite"
            " (did the last steps diverge?), the learning rate, and vLLM's dtype."
        )
    return Rollout(
        problem=prompt.problem,
        prompt_ids=torch.tensor(prompt.token_ids),
        response_ids=torch.tensor(token_ids),
        log_probs=torch.tensor(log_probs if knows_log_probs(sampling) else [math.nan] * len(log_probs)),
        finished=finished,
        seed=seed,
        text=closed_text(student.tokenizer, token_ids, finished),
    )


def run_to_the_end(
    engine: Any, num_requests: int, read: Callable[[int, Any], None], interrupted: threading.Event
) -> None:
    """Step an engine of this process until its requests "0", "1", ... are answered; what an error leaves is called off.

    Args:
        engine: vLLM's `LLMEngine`.
        num_requests: How many it was given.
        read: Takes a request's number and its answer.
        interrupted: Set by another thread when the answers are wanted no more.

    Raises:
        CalledOff: It was.
    """
    waiting = {str(i) for i in range(num_requests)}
    try:
        while engine.has_unfinished_requests():
            if interrupted.is_set():
                raise CalledOff(f"engine: the run was stopped while {len(waiting)} responses were under way.")
            for output in engine.step():
                read(int(output.request_id), output.outputs[0])
                waiting.discard(output.request_id)
    except BaseException:
        engine.abort_request(sorted(waiting))
        raise


def knows_log_probs(sampling: Sampling) -> bool:
    """Whether vLLM tells log-probabilities as they are before any cut."""
    return sampling.temperature == 0 or sampling.is_whole_distribution


def warn_about_cut(sampling: Sampling) -> None:
    """Say that rollouts under a cut have no log-probabilities."""
    warnings.warn(
        f"sampling.top_p={sampling.top_p}, sampling.top_k={sampling.top_k}: vLLM does not tell the log-probabilities"
        " before such a cut, so those of these rollouts are NaN. Validation does not need them; training with an"
        " importance ratio does: set top_p to 1 and top_k to 0 there, or use HFEngine.",
        stacklevel=3,
    )
