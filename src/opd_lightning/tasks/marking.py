"""`AnswerChecker`: are two final answers equal? Text first, algebra in processes of its own when text cannot tell."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.tasks.answers import MAX_ANSWER_CHARACTERS, same_answer

_WORKER_SCRIPT = Path(__file__).with_name("marking_worker.py")
_START_SECONDS = 120.0
_FIRST_SECONDS = 0.25  # ordinary answers take 0.01 to 0.1
_FIRST_RUN_LENGTH = 8  # forking costs as much as several ordinary answers, and nothing beside a slow one

Pair = tuple[str, str]


class AnswerChecker:
    """Compares final answers, safely whatever a model wrote.

    `same_answer` settles numbers and literal matches at once. The rest goes to math-verify in a separate process, which
    marks several answers side by side, in forks of its own. It is started when first needed and lives until
    `close`, the end of this object or the end of the interpreter; a forked or unpickled copy starts its own.

    Every answer first has a quarter of a second. Those that need more share `seconds_per_step` evenly and have at most
    `seconds_per_answer` each; what is not finished then, exhausts the memory or crashes is wrong, with a warning. All
    limits are processor time, so neither a busy machine nor the number of processes changes a mark. (Ten times as much
    wall-clock time ends an answer that waits without using the processor.)

    math-verify's own time limits are signal handlers: they work in the main thread only and cannot interrupt
    big-number arithmetic, hence the processes.

    Args:
        seconds_per_answer: Most processor time that math-verify may spend on one answer.
        seconds_per_step: Processor time for all slow answers of one call of `equal_all`, over all processes.
        num_processes: Answers marked side by side.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(self, seconds_per_answer: float = 3.0, seconds_per_step: float = 60.0, num_processes: int = 8) -> None:
        for name, value in (("seconds_per_answer", seconds_per_answer), ("seconds_per_step", seconds_per_step)):
            if not value > 0:
                raise ValueError(f"task.{name}: expected a positive number of seconds, got {value}.")
        check_at_least(1, "task", num_processes=num_processes)
        self.seconds_per_answer = seconds_per_answer
        self.seconds_per_step = seconds_per_step
        self.num_processes = num_processes
        self._lock = threading.Lock()
        self._has_warned = False
        self._worker: _Worker | None = None

    def equal(self, reference: str, answer: str) -> bool:
        """Whether the answer equals the reference.

        Raises:
            RuntimeError: The marking process does not start, or is killed again and again.
        """
        return self.equal_all([reference], [answer])[0]

    def equal_all(self, references: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Compare pair by pair; a pair that occurs again is not worked out again.

        Raises:
            RuntimeError: The marking process does not start, or is killed again and again.
        """
        pairs = list(zip(references, answers, strict=True))
        verdicts = {pair: same_answer(*pair) for pair in dict.fromkeys(pairs)}
        for pair, verdict in verdicts.items():
            if verdict is None and len(pair[0]) > MAX_ANSWER_CHARACTERS:
                verdicts[pair] = False
        if unsettled := [pair for pair, verdict in verdicts.items() if verdict is None]:
            with self._lock:
                verdicts |= self._work_out(unsettled)
        return [verdicts[pair] is True for pair in pairs]

    def close(self) -> None:
        """End the process, if there is one; the next comparison that needs it starts another."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_worker": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def _work_out(self, pairs: list[Pair]) -> dict[Pair, bool | None]:
        """Verdicts by algebra; None for those that did not get one in time."""
        limit = min(_FIRST_SECONDS, self.seconds_per_answer)
        verdicts = self._ask(pairs, limit, _FIRST_RUN_LENGTH)
        slow = [pair for pair in pairs if verdicts[pair] is None]
        share = min(self.seconds_per_answer, self.seconds_per_step / max(1, len(slow)))
        if slow and share > limit:
            limit = share
            verdicts |= self._ask(slow, limit, 1)
        self._report([pair for pair in slow if verdicts[pair] is None], len(slow), limit)
        return verdicts

    def _report(self, unmarked: list[Pair], num_slow: int, limit: float) -> None:
        over_budget = num_slow * self.seconds_per_answer > self.seconds_per_step
        if not unmarked or (self._has_warned and not over_budget):
            return
        self._has_warned = True
        finding = (
            f"math-verify did not finish with {len(unmarked)} answers (first: {unmarked[0][1][:60]!r}); they count as"
            " wrong (grade 0)."
        )
        reason = (
            f"{num_slow} slow answers had to share task.seconds_per_step={self.seconds_per_step:g}, {limit:.2g} s each."
            if over_budget
            else f"Each had {limit:g} s of processor time (task.seconds_per_answer). Further cases are not reported."
        )
        warnings.warn(f"{finding} {reason}", stacklevel=5)

    def _ask(self, pairs: list[Pair], seconds: float, run_length: int) -> dict[Pair, bool | None]:
        # a guard only: every answer ends by itself after ten times its seconds
        guard = _START_SECONDS + 10 * seconds * (run_length + len(pairs) / self.num_processes)
        for _ in range(2):  # whoever killed the process once, the answers were not it: they run in forks
            if self._worker is None or self._worker.owner != os.getpid():
                self._worker = _Worker(self.num_processes)
            reply = None
            try:
                reply = self._worker.ask([seconds, run_length, pairs], timeout=guard)
            finally:
                if reply is None:  # also when interrupted: a late reply must not answer a later question
                    self.close()
            if reply is not None:
                return dict(zip(pairs, reply, strict=True))
        raise RuntimeError(
            f"The marking process ({_WORKER_SCRIPT.name}) was killed twice while it marked {len(pairs)} answers. Look"
            " for a lack of memory; fewer task.num_processes need less."
        )


class _Worker:
    """One process of marking_worker.py and the thread that listens to it.

    A plain subprocess rather than `multiprocessing`: it does not import the user's main script again, may be started by
    daemonic processes, and shares no state with this one. It leads a process group, so that it and its forks end
    together.
    """

    def __init__(self, num_processes: int) -> None:
        if not hasattr(os, "fork"):
            raise RuntimeError("Marking by algebra forks processes, which this system cannot: use Linux, macOS or WSL.")
        self.owner = os.getpid()
        # -P keeps this folder off the import path. A fixed hash seed fixes the order in which sympy tries things.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_SCRIPT), str(num_processes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONHASHSEED": "0"},
            process_group=0,
        )
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests = self._process.stdin
        threading.Thread(target=_listen, args=(self._process.stdout, self._replies), daemon=True).start()
        self.stop = weakref.finalize(self, _stop, self._process, self.owner)
        if self._next_reply(_START_SECONDS) != "ready":
            self.stop()
            raise RuntimeError(
                f"The marking process ({_WORKER_SCRIPT.name}) did not start: exit code {self._process.returncode}. Its"
                " own message stands above; a missing or broken math-verify is the usual reason."
            )

    def ask(self, question: list[Any], timeout: float) -> Any:
        """The reply, or None when the process died or stayed silent for `timeout` wall-clock seconds."""
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
