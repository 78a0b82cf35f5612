"""`VLLMServerTeacher`: scores from a model that somebody else's vLLM serves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning.backends.vllm.answers import scored_tokens
from opd_lightning.backends.vllm.server.client import Connection, ServerPool, wait_for
from opd_lightning.backends.vllm.server.listed_scores import read_scores
from opd_lightning.backends.vllm.server.preflight import ServedModel, check_served_model
from opd_lightning.interfaces import MicroBatch, Rollout, ScoreRequest, Student, Teacher
from opd_lightning.objectives import ListedScores

_Parts = tuple[Tensor, Tensor, Tensor]


class VLLMServerTeacher(Teacher):
    """Prompt log-probabilities of the student's exact token ids, from one or more vLLM servers.

    Offers the sampled token and the teacher's own top k, in nats at temperature 1; not the student's ids and not the
    full vocabulary. All micro-batches of a step are requested before the first is used, so the servers work while the
    student trains on what is there; with an engine that tells of rollouts early, scoring begins while others are still
    being generated. What it costs is mostly JSON: about 70 bytes per token for the sampled token alone, 1.3 kB for
    k = 20. With an objective that needs the sampled token only, `max_top_k: 0` saves what the metrics would ask for.

    The served model normalises over all rows of its head. Rows beyond the vocabulary get next to nothing from a trained
    model; where one is among the top k, the run stops.

    Before any weight is loaded the served model is checked: its name, its context, that it decodes a spread of token
    ids as the student does, and that it grants `max_top_k`. Start it with, for example,
    ``vllm serve Qwen/Qwen3-4B --max-logprobs 20 --port 8001``.

    Args:
        connection: The servers and how patient to be; all serve the same model.
        model: Name under which it is served; None takes the first that the server lists.
        max_top_k: Most entries of the teacher's top-k list, as granted by the server's ``--max-logprobs``; metrics that
            need such a list are left out when it is shorter than `model.top_k_metrics`.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, connection: Connection, model: str | None = None, max_top_k: int = 20) -> None:
        if max_top_k < 0:
            raise ValueError(f"teacher.max_top_k: expected 0 or a positive integer, got {max_top_k}.")
        self.connection = connection
        self.model = model
        self.max_top_k = max_top_k
        self._pool: ServerPool | None = None
        self._served: ServedModel | None = None
        self._device = torch.device("cpu")
        self._vocab_size = 0
        self._early: dict[int, dict[_Question, Future[_Parts]]] = {}  # by step
        self._lock = threading.Lock()

    @property
    def offer(self) -> ScoreRequest:
        """The sampled token and the top `max_top_k`."""
        return ScoreRequest(top_k=self.max_top_k)

    @property
    def context_length(self) -> int | None:
        """A token less than the servers' shortest --max-model-len, as they generate one; None before `preflight`."""
        return None if self._served is None else self._served.max_model_len - 1

    def check(self, request: ScoreRequest) -> None:
        """Refuse what goes beyond the offer, and any temperature but 1.

        Raises:
            ValueError: It does.
        """
        super().check(request)
        if request.temperature != 1:
            raise ValueError(
                f"objective.teacher_temperature={request.temperature}: a vLLM server scores prompts at temperature 1."
                " Set it to 1, or use HFTeacher."
            )

    def preflight(self, student: Student) -> None:
        """Ask the servers what they serve and compare it with the student.

        Raises:
            ValueError: Another model, vocabulary, or too small a ``--max-logprobs``.
            ServerUnreachable: No answer.
        """
        pool = self._open()
        self._served = check_served_model(pool, self.model, student.tokenizer, self.max_top_k)
        self._vocab_size = student.tokenizer.vocab_size

    def page(self) -> None:
        """Nothing to do: its weights are on the servers."""

    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Check the servers, if that has not been done, and remember where scores are wanted."""
        if self._served is None:
            self.preflight(student)
        self._device = device
        self._early = {}

    def score(self, batch: MicroBatch, request: ScoreRequest) -> ListedScores:
        """Score the response tokens of one micro-batch."""
        return next(iter(self.score_all([batch], request)))

    def prefetch(self, rollout: Rollout, request: ScoreRequest, step: int) -> None:
        """Request the scores of a rollout of this step now, and forget what steps before the last have not used."""
        question = _ask(rollout, request.top_k)
        with self._lock:
            if self._pool is None:  # closed, while the engine was still finishing a step that nobody will train
                return
            for old in [other for other in self._early if other < step - 1]:
                for future in self._early.pop(old).values():
                    future.cancel()
            questions = self._early.setdefault(step, {})
            if question not in questions:
                questions[question] = self._submit(question)

    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[ListedScores]:
        """Score the micro-batches of one step in order, all requested before the first is used.

        Raises:
            ValueError: A sequence is too long for the server, or its answer makes no sense.
            ServerUnreachable: No answer.
        """
        self.check(request)
        pending = [(batch.tokens.ids, self._request(batch, request.top_k)) for batch in batches]
        try:
            while pending:  # let go of what has been used
                yield self._gather(*pending.pop(0))
        finally:
            for future in itertools.chain.from_iterable(futures for _, futures in pending):
                future.cancel()

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            pool, self._pool, self._served = self._pool, None, None
            self._early = {}
        if pool is not None:
            pool.close()

    def _open(self) -> ServerPool:
        if self._pool is None:
            self._pool = ServerPool(self.connection, "teacher")
        return self._pool

    def _request(self, batch: MicroBatch, k: int) -> list[Future[_Parts]]:
        questions = [_ask(rollout, k) for rollout in batch.rollouts]
        with self._lock:
            early = {
                question: future
                for asked in self._early.values()
                for question, future in asked.items()
                if not (future.done() and (future.cancelled() or future.exception()))
            }
            return [early.get(question) or self._submit(question) for question in questions]

    def _submit(self, question: _Question) -> Future[_Parts]:
        assert self._pool is not None and self._served is not None, "call setup before score"
        num_tokens, limit = len(question.token_ids), self._served.max_model_len
        if num_tokens >= limit:
            raise ValueError(
                f"teacher: a rollout of {num_tokens} tokens does not fit into the server's {limit}, one of which it"
                " needs for itself. Start it with a larger --max-model-len, or set"
                f" student.max_context_length: {limit - 1}."
            )
        body = {
            "model": self._served.name,
            "prompt": question.token_ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": question.k,
        }
        return self._pool.submit(body, question.read)

    def _gather(self, response_ids: Tensor, futures: list[Future[_Parts]]) -> ListedScores:
        parts = wait_for(futures)
        sampled, ids, log_probs = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        if ids.numel() and int(ids.max()) >= self._vocab_size:
            raise ValueError(
                f"teacher: the served model finds id {int(ids.max())} likely, which is beyond the student's"
                f" {self._vocab_size} tokens. Its head has padding rows that were never trained down, or tokens of its"
                " own; use HFTeacher, which cuts them off."
            )
        columns = (response_ids, sampled, ids, log_probs)
        return ListedScores(*(column.to(self._device, non_blocking=True) for column in columns))


@dataclass(frozen=True)
class _Question:
    """A sequence, the places in it that are to be scored, and how long a top-k list is wanted."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]
    k: int

    def read(self, choice: Mapping[str, Any]) -> _Parts:
        return read_scores(scored_tokens(choice, len(self.token_ids)), self.token_ids, self.places, self.k)


def _ask(rollout: Rollout, k: int) -> _Question:
    token_ids = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
    places = (len(rollout.prompt_ids) + rollout.trained_positions).tolist()
    return _Question(tuple(token_ids), tuple(places), k)
