"""What is behind the address? Asked before step 1: name, context, token ids, granted top-k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_lightning.backends.vllm.answers import first_choice, listed_models, read_entry, scored_tokens
from opd_lightning.backends.vllm.server.client import ServerPool
from opd_lightning.backends.vllm.server.exchange import Server, ServerRefusal, one_line
from opd_lightning.interfaces import Tokenizer

_NUM_PROBED = 512  # token ids compared
_MOST_BIASED = 1024  # token ids whose logits a vLLM request may change
_LEAST_CONTEXT = 4  # tokens; the checks need three
_NUM_NAMED = 3  # differences named in a message


@dataclass(frozen=True)
class ServedModel:
    """What a server serves.

    Attributes:
        name: Under which it is asked for.
        max_model_len: Most tokens (prompt + response).
    """

    name: str
    max_model_len: int


def check_served_model(pool: ServerPool, name: str | None, tokenizer: Tokenizer, top_k: int) -> ServedModel:
    """Check every server of a pool against the student's tokenizer; no text is ever tokenised by the server.

    Args:
        pool: The servers.
        name: Name that must be served; None takes the first one.
        tokenizer: The student's.
        top_k: Prompt log-probabilities that will be asked for.

    Returns:
        The model, with the shortest context of all servers.

    Raises:
        ValueError: The name is not served, a token id means something else there, or `top_k` is not granted.
        ServerUnreachable: A server does not answer.
    """
    models = [_find_model(pool, server, name) for server in pool.servers]
    names = {model.name for model in models}
    if len(names) > 1:
        raise ValueError(
            f"{pool.role}.model: the servers serve different models: {one_line(', '.join(sorted(names)))}. Name one."
        )
    for server, model in zip(pool.servers, models, strict=True):
        _compare_tokens(pool, server, model, tokenizer)
        _ask_for_top_k(pool, server, model, top_k)
    return ServedModel(models[0].name, min(model.max_model_len for model in models))


def _find_model(pool: ServerPool, server: Server, name: str | None) -> ServedModel:
    listed = pool.ask(server, "/v1/models", read=listed_models)
    found = [model for model in listed if name is None or name in (model["id"], model.get("root"))]
    if not found:
        raise ValueError(
            f"{pool.role}.model: {server.url} does not serve {name!r}; it serves"
            f" {one_line(', '.join(repr(model['id']) for model in listed))}."
        )
    limit = found[0].get("max_model_len")
    if not isinstance(limit, int) or limit < _LEAST_CONTEXT:
        raise ValueError(
            f"{pool.role}: {server.url} names no max_model_len of at least {_LEAST_CONTEXT}; it is no vLLM server."
        )
    return ServedModel(found[0]["id"], limit)


def _compare_tokens(pool: ServerPool, server: Server, model: ServedModel, tokenizer: Tokenizer) -> None:
    """Let the server decode a spread of token ids, and compare."""
    step = max(1, tokenizer.vocab_size // _NUM_PROBED)
    probed = sorted({*range(0, tokenizer.vocab_size, step), *tokenizer.stop_ids, tokenizer.vocab_size - 1})
    size = min(_NUM_PROBED, model.max_model_len - 2)
    different = []
    for start in range(0, len(probed), size):
        chunk = probed[start : start + size]
        for token_id, theirs in zip(chunk, _decode(pool, server, model, chunk), strict=True):
            ours = tokenizer.decode([token_id], skip_special_tokens=False)
            if ours != theirs and "\ufffd" not in ours + theirs:  # half a character: decoders differ
                different.append(f"{token_id} is {ours!r} for the student and {theirs[:50]!r} for the server")
    if different:
        raise ValueError(
            f"{pool.role}: {server.url} serves a model with other token ids: {'; '.join(different[:_NUM_NAMED])}"
            f" ({len(different)} of {len(probed)} compared). Its scores would mean nothing; serve a model of the"
            " student's family."
        )


def _decode(pool: ServerPool, server: Server, model: ServedModel, token_ids: Sequence[int]) -> list[str]:
    """What each id means to the server: it names the tokens it scores."""
    body = {
        "model": model.name,
        "prompt": [token_ids[0], *token_ids],  # the first token of a prompt has no score
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
    }
    try:
        choice = pool.ask(server, "/v1/completions", body, read=first_choice)
    except ServerRefusal as refusal:
        if "vocabulary" not in refusal.reason:
            raise
        raise ValueError(
            f"{pool.role}: {server.url} serves a model with fewer token ids than the student ({refusal.reason})."
            " Serve a model of the student's family."
        ) from refusal

    def read(choice: Mapping[str, Any]) -> list[str]:
        entries = scored_tokens(choice, 1 + len(token_ids))[1:]
        return [_decoded(entry, token_id) for token_id, entry in zip(token_ids, entries, strict=True)]

    return pool.use_of(server, choice, read)


def _decoded(entry: Any, token_id: int) -> str:
    read_entry(entry, token_id)
    return str(entry[str(token_id)].get("decoded_token") or "")


def _ask_for_top_k(pool: ServerPool, server: Server, model: ServedModel, top_k: int) -> None:
    body = {"model": model.name, "prompt": [0, 0], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
    try:
        pool.ask(server, "/v1/completions", body, read=first_choice)
    except ServerRefusal as refusal:
        raise ValueError(
            f"{pool.role}.max_top_k={top_k}: {server.url} does not grant so many log-probabilities ({refusal.reason})."
            f" Start it with --max-logprobs {top_k}, or lower max_top_k."
        ) from refusal


def find_padding_rows(
    pool: ServerPool, served: ServedModel, num_rows: int, vocab_size: int
) -> tuple[int | None, dict[str, float]]:
    """Find out whether the servers' models have the rows beyond the vocabulary that the student's has.

    Args:
        pool: The servers.
        served: Their model.
        num_rows: Rows of the student's embedding.
        vocab_size: Real token ids.

    Returns:
        Rows that the servers want of the embedding (None is all), and the logit bias that forbids those beyond the
        vocabulary in a request.

    Raises:
        ValueError: There are more of them than a request can forbid.
    """
    if num_rows == vocab_size:
        return vocab_size, {}
    try:
        pool.complete({"model": served.name, "prompt": [num_rows - 1], "max_tokens": 1}, lambda choice: None)
    except ServerRefusal:
        return vocab_size, {}
    if num_rows - vocab_size > _MOST_BIASED:
        raise ValueError(
            f"engine: the model has {num_rows - vocab_size} rows beyond the vocabulary, more than a request can"
            f" forbid ({_MOST_BIASED}). Start the servers with --load-format dummy --hf-overrides"
            f" '{{\"vocab_size\": {vocab_size}}}'."
        )
    return None, {str(token_id): -100.0 for token_id in range(vocab_size, num_rows)}
