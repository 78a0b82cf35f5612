"""`AnswerChecker`: are two final answers equal? Text first, algebra in a process of its own when text cannot tell."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from opd_lightning.tasks.answers import MAX_ANSWER_CHARACTERS, same_answer

_WORKER_SCRIPT = Path(__file__).with_name("marking_worker.py")
_START_SECONDS = 120.0


class AnswerChecker:
    """Compares final answers, safely whatever a model wrote.

    `same_answer` settles numbers and literal matches at once. The rest goes to math-verify in a separate process. It
    is started when first needed and lives until `close`, the end of this object or the end of the interpreter; a forked
    or unpickled copy starts its own. An answer that takes longer than allowed, exhausts the memory or crashes the
    process is wrong, and the process is replaced, with a warning the first time. The limit is processor time, so a busy
    machine changes no mark; ten times as much wall-clock time is the limit where the system has no such timer.

    math-verify's own time limits are signal handlers: they work in the main thread only and cannot interrupt
    big-number arithmetic, hence the process.

    Args:
        seconds_per_answer: Processor time that math-verify may spend on one answer.

    Raises:
        ValueError: `seconds_per_answer` is not positive.
    """

    def __init__(self, seconds_per_answer: float = 3.0) -> None:
        if not seconds_per_answer > 0:
            raise ValueError(f"seconds_per_answer: expected a positive number of seconds, got {seconds_per_answer}.")
        self.seconds_per_answer = seconds_per_answer
        self.num_replaced = 0  # processes that an answer has cost
        self._worker: _Worker | None = None

    def equal(self, reference: str, answer: str) -> bool:
        """Whether the answer equals the reference.

        Raises:
            RuntimeError: The marking process does not start.
        """
        verdict = same_answer(reference, answer)
        return self._equal_by_algebra(reference, answer) if verdict is None else verdict

    def equal_all(self, references: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Compare pair by pair; a pair that occurs again is not worked out again."""
        verdicts: dict[tuple[str, str], bool] = {}
        for pair in zip(references, answers, strict=True):
            if pair not in verdicts:
                verdicts[pair] = self.equal(*pair)
        return [verdicts[pair] for pair in zip(references, answers, strict=True)]

    def close(self) -> None:
        """End the process, if there is one; the next comparison that needs it starts another."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_worker": None}

    def _equal_by_algebra(self, reference: str, answer: str) -> bool:
        if len(reference) > MAX_ANSWER_CHARACTERS:
            return False
        if self._worker is None or self._worker.owner != os.getpid():
            self._worker = _Worker(self.seconds_per_answer)
        reply = self._worker.ask([reference, answer], timeout=10 * self.seconds_per_answer)
        if reply is None:
            self.close()
            self.num_replaced += 1
            if self.num_replaced == 1:
                warnings.warn(
                    f"math-verify did not finish with the answer {answer[:60]!r} and was ended; the answer counts as"
                    " wrong. Further cases are not reported.",
                    stacklevel=3,
                )
        return reply is True


class _Worker:
    """One process of marking_worker.py and the thread that listens to it.

    A plain subprocess rather than `multiprocessing`: it does not import the user's main script again, may be started by
    daemonic processes, and shares no state with this one.
    """

    def __init__(self, seconds_per_answer: float) -> None:
        self.owner = os.getpid()
        # -P keeps this folder, whose math.py would hide the standard library's, off the import path. A fixed hash seed
        # fixes the order in which sympy tries things.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_SCRIPT), str(seconds_per_answer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        threading.Thread(target=_listen, args=(self._process.stdout, self._replies), daemon=True).start()
        self.stop = weakref.finalize(self, _stop, self._process, self.owner)
        self._lock = threading.Lock()
        if self._next_reply(_START_SECONDS) != "ready":
            self.stop()
            raise RuntimeError(
                f"The marking process ({_WORKER_SCRIPT.name}) did not start: exit code {self._process.returncode}. Its"
                " own message stands above; a missing or broken math-verify is the usual reason."
            )

    def ask(self, question: list[str], timeout: float) -> Any:
        """The reply, or None when the process died or stayed silent for `timeout` wall-clock seconds."""
        with self._lock:
            try:
                self._requests.write(json.dumps(question) + "\n")
                self._requests.flush()
            except BrokenPipeError:
                return None
            return self._next_reply(timeout)

    def _next_reply(self, timeout: float) -> Any:
        try:
            return self._replies.get(timeout=timeout)
        except queue.Empty:
            return None


def _listen(replies: IO[str], received: queue.SimpleQueue[Any]) -> None:
    for line in replies:
        received.put(json.loads(line))
    received.put(None)  # the process is gone


def _stop(process: subprocess.Popen[str], owner: int) -> None:
    # A forked copy must not end its parent's process.
    if os.getpid() == owner:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
