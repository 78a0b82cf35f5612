"""Nothing that a vLLM says is used before it has been looked at here: by engines and teachers, in process and by HTTP.

Two things can be wrong. `NoAnswer`: it does not look like an answer of vLLM's at all (a login page, `null`, an error of
a proxy); another attempt may bring one. `UnfitAnswer`: it does, and contradicts the question; asking again would hide a
server that computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

_ROUNDING = 1e-3  # nats that a log-probability of a sure token may lie above 0
_LOWEST = -1e30  # vLLM's own floor is -9999; in float32 this is finite still


class NoAnswer(ValueError):
    """What came is none of vLLM's answers."""


class UnfitAnswer(ValueError):
    """An answer contradicts its question."""


def field(name: str, *kinds: type) -> Callable[[Any], Any]:
    """A reader of one field of an answer, which must be of one of these kinds.

    Raises:
        NoAnswer: (The reader) There is none.
    """

    def read(answer: Any) -> Any:
        if not isinstance(answer, Mapping) or name not in answer or not isinstance(answer[name], kinds):
            raise NoAnswer(f"an answer without {name}")
        return answer[name]

    return read


def first_choice(answer: Any) -> Mapping[str, Any]:
    """The first choice of a completion.

    Raises:
        NoAnswer: There is none.
    """
    choices = field("choices", list)(answer)
    if not choices or not isinstance(choices[0], Mapping):
        raise NoAnswer("an answer without choices")
    return choices[0]


def listed_models(answer: Any) -> list[Mapping[str, Any]]:
    """What is served, each with its `id`.

    Raises:
        NoAnswer: It is no such list.
    """
    models: list[Mapping[str, Any]] = field("data", list)(answer)
    for model in models:
        field("id", str)(model)
    return models


def response_of(choice: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Token ids and log-probabilities of a completion, not yet checked (`check_response`).

    Raises:
        UnfitAnswer: It has none.
    """
    if "token_ids" not in choice or "logprobs" not in choice:
        raise UnfitAnswer("vLLM gave a response without token_ids or without logprobs. Is it version 0.32 or later?")
    # A request that is called off before its first token has neither.
    token_ids, log_probs = choice["token_ids"] or [], choice["logprobs"] or {"token_logprobs": []}
    log_probs = log_probs.get("token_logprobs") if isinstance(log_probs, Mapping) else None
    if not isinstance(token_ids, list) or not isinstance(log_probs, list):
        raise UnfitAnswer("vLLM gave token_ids or logprobs of a response that are no lists.")
    return token_ids, log_probs


def check_response(
    token_ids: Sequence[Any],
    log_probs: Sequence[Any],
    *,
    vocab_size: int,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> None:
    """Check a response against what was asked.

    Numbers that are not finite pass, and so does a response that is cut short: these have causes of their own.

    Args:
        token_ids: The response.
        log_probs: Of its tokens, in nats.
        vocab_size: Ids lie below.
        max_new_tokens: Most tokens that were asked for.
        stop_ids: Ids that end a response.

    Raises:
        UnfitAnswer: It does not fit.
    """
    num_tokens = len(token_ids)
    if num_tokens > max_new_tokens:
        raise UnfitAnswer(f"vLLM gave a response of {num_tokens} tokens; at most {max_new_tokens} were asked for.")
    if len(log_probs) != num_tokens:
        raise UnfitAnswer(f"vLLM gave {len(log_probs)} log-probabilities for {num_tokens} tokens of a response.")
    for token_id in token_ids:
        if not _is_whole(token_id) or not 0 <= token_id < vocab_size:
            raise UnfitAnswer(
                f"vLLM sampled the token {_shown(token_id)}; the student's ids are 0 to {vocab_size - 1}. Does it serve"
                " the student's architecture?"
            )
    if any(token_id in stop_ids for token_id in token_ids[:-1]):
        raise UnfitAnswer(
            "vLLM went on after a token that ends a response (sampling.stop_ids). It ignores stop_token_ids; serve the"
            " model with another version, or use HFEngine."
        )
    for log_prob in log_probs:
        if not isinstance(log_prob, float) or math.isfinite(log_prob):
            _check_log_prob(log_prob)


def scored_tokens(choice: Mapping[str, Any], num_tokens: int) -> Sequence[Any]:
    """The scores of a prompt's tokens, one entry each, of which the first says nothing.

    Raises:
        UnfitAnswer: There are none, or not as many.
    """
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise UnfitAnswer("vLLM gave no prompt_logprobs.")
    if len(entries) != num_tokens:
        raise UnfitAnswer(f"vLLM scored {len(entries)} tokens of a sequence of {num_tokens}.")
    return entries


def read_entry(entry: Any, token_id: int, k: int = 0) -> dict[int, float]:
    """Log-probabilities by id from the scores of one token: its own and those of the likeliest k.

    Raises:
        UnfitAnswer: One is missing, or is no log-probability.
    """
    if not isinstance(entry, Mapping) or str(token_id) not in entry or len(entry) < k:
        raise UnfitAnswer(f"vLLM gave no scores for token {token_id}, or fewer than {k}.")
    return {_read_id(name): _read_log_prob(score) for name, score in entry.items()}


def _read_id(name: Any) -> int:
    if not isinstance(name, str) or not name.isdecimal() or len(name) > 18 or str(int(name)) != name:
        raise UnfitAnswer(f"vLLM gave a score for {_shown(name)}, which is no token id.")
    return int(name)


def _read_log_prob(score: Any) -> float:
    return _check_log_prob(score.get("logprob") if isinstance(score, Mapping) else None)


def _check_log_prob(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _LOWEST <= value <= _ROUNDING:
        raise UnfitAnswer(f"vLLM gave {_shown(value)} as a log-probability; expected a finite number of at most 0.")
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return ascii(value)[:40]
