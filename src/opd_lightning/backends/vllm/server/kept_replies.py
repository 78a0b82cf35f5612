"""Questions to a chat model whose replies are kept on disk, so that none is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_lightning.backends.vllm.answers import UnfitAnswer
from opd_lightning.backends.vllm.server.client import ServerPool
from opd_lightning.whole_files import written_whole

_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        messages: The chat.
        read: Makes something of the reply, or raises `UnfitAnswer`.
        seed: Tells equal questions apart; above 0 the reply is sampled.
        name: What its file is called by; None takes the question itself.
    """

    messages: list[dict[str, str]]
    read: Callable[[str], Any]
    seed: int = 0
    name: Any = None


@dataclass(frozen=True)
class KeptReplies:
    """A folder of replies, one file each.

    Args:
        folder: Made if it does not exist.
        model: Who is asked.
        max_tokens: Longest reply.
        num_attempts: Most times that a question is asked, each with another seed.
    """

    folder: str
    model: str
    max_tokens: int
    num_attempts: int

    def ask(self, pool: ServerPool, questions: Sequence[Question]) -> list[Any]:
        """What each question's reader makes of its reply, in order; those of one attempt are asked side by side.

        Raises:
            ValueError: A server refuses, or its replies do not fit.
            ServerUnreachable: None answers.
        """
        found: dict[int, Any] = {}
        reason: UnfitAnswer | None = None
        for attempt in range(self.num_attempts):
            replies = self._replies(pool, {i: q for i, q in enumerate(questions) if i not in found}, attempt)
            for i, (file, reply) in replies.items():
                try:
                    text = reply.result() if isinstance(reply, Future) else reply
                    if isinstance(reply, Future):
                        _write(file, text)
                    found[i] = questions[i].read(text)
                except UnfitAnswer as error:
                    reason = error
            if len(found) == len(questions):
                return [found[i] for i in range(len(questions))]
        raise ValueError(
            f"objective.judge: {self.model!r} at {', '.join(pool.connection.addresses)} gave no usable reply in"
            f" {self.num_attempts} attempts: {reason}. Take a stronger model, or raise judge.max_tokens."
        )

    def _replies(
        self, pool: ServerPool, questions: Mapping[int, Question], attempt: int
    ) -> dict[int, tuple[Path, str | Future[str]]]:
        """The kept reply of each question, or one under way; equal questions are asked once."""
        asked: dict[Path, Future[str]] = {}
        replies: dict[int, tuple[Path, str | Future[str]]] = {}
        for i, question in questions.items():
            seed = question.seed + 1000 * attempt
            body = {
                "model": self.model,
                "messages": [{name: _utf8(text) for name, text in each.items()} for each in question.messages],
                "temperature": 1.0 if seed else 0.0,
                "seed": seed,
                "max_tokens": self.max_tokens,
            }
            key = body if question.name is None else [self.model, question.name, seed]
            file = Path(self.folder).expanduser() / f"{_digest(key)}.json"
            kept = _read(file)
            if kept is None and file not in asked:
                asked[file] = pool.submit(body, _text, _PATH)
            replies[i] = file, asked[file] if kept is None else kept
        return replies


def _text(choice: Mapping[str, Any]) -> str:
    """The text of a chat's choice.

    Raises:
        UnfitAnswer: It has none.
    """
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise UnfitAnswer("a reply without text")
    return text


def _utf8(text: str) -> str:
    """Half a character of a surrogate pair cannot be sent; it is backslashed."""
    return text.encode("utf-8", "backslashreplace").decode()


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _read(file: Path) -> str | None:
    """A reply that was kept; None where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    if not file.is_file():
        return None
    try:
        reply: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        reply = None
    if not isinstance(reply, str):
        raise ValueError(f"objective.judge.cache: {str(file)!r} is damaged. Remove it to ask again.")
    return reply


def _write(file: Path, reply: str) -> None:
    """Keep a reply, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file, f".{os.getpid()}") as unfinished:  # others may keep the same one at the same time
        unfinished.write(json.dumps(reply).encode())
