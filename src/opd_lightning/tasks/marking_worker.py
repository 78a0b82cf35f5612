r"""The process that lets math-verify loose on what a model wrote. Run as a script, never imported.

It imports the standard library and math-verify only, so that it starts within two seconds and holds no torch. One line
of JSON in, ``[seconds, run_length, [[reference, answer], ...]]``; one line out, a list of ``true``, ``false`` or
``null`` (no verdict); a first line ``"ready"`` when it can begin. Answers are marked in forks, several at a time, each
of which takes a run of them: it starts from the same memory whatever was marked before, and which answers share a run
follows from the list alone, so that no verdict depends on who was faster. An answer that takes too much processor time
kills its fork where it stands, big-number arithmetic included: the system's timer does that, not a Python handler,
which would wait for the multiplication to end.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

_MAX_MEMORY_BYTES = 1 << 30  # for each fork
_WARM_UP = (r"\frac{1}{2}+x", "(1, 2)", r"\{1, 2\}", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\sin(x)^2", "no idea")

Compare = Callable[[str, str], bool]


class Run(NamedTuple):
    """Answers that one fork marks, in order.

    Attributes:
        positions: Which answers.
        pid: The fork.
        verdicts: Pipe on which it writes a byte for each answer marked; closed when it ends.
    """

    positions: list[int]
    pid: int
    verdicts: int


def ignore_interrupts() -> None:
    """Outlive Ctrl-C and a scheduler's signals to the whole job: the trainer ends this process when it is done."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def limit_memory() -> None:
    """Bound the address space, so that a tower of powers is a MemoryError here and not a full machine."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > _MAX_MEMORY_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, hard))


def begin(compare: Compare, pairs: list[list[str]], positions: list[int], seconds: float) -> Run:
    """Fork off the marking of some pairs."""
    verdicts, written_by_fork = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for position in positions:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                signal.setitimer(signal.ITIMER_REAL, 10 * seconds)  # for one that waits and uses no processor
                os.write(written_by_fork, b"\1" if compare(*pairs[position]) else b"\0")
        finally:
            os._exit(0)
    os.close(written_by_fork)
    return Run(positions, pid, verdicts)


def mark_all(
    compare: Compare, pairs: list[list[str]], seconds: float, run_length: int, num_processes: int
) -> list[bool | None]:
    """Mark all pairs with at most `num_processes` forks at a time; end at once when the trainer is gone."""
    marked: list[bool | None] = [None] * len(pairs)
    everything = list(range(len(pairs)))
    waiting = [everything[start : start + run_length] for start in everything[::run_length]]
    running: dict[int, Run] = {}
    while waiting or running:
        while waiting and len(running) < num_processes:
            run = begin(compare, pairs, waiting.pop(), seconds)
            running[run.verdicts] = run
        ready, _, _ = select.select([0, *running], [], [])
        if 0 in ready:  # the trainer sends nothing before it has its reply: this is the end of its pipe
            for run in running.values():
                os.kill(run.pid, signal.SIGKILL)
            sys.exit()
        for pipe in ready:
            positions, pid, _ = running[pipe]
            if received := os.read(pipe, 4096):
                for byte in received:
                    marked[positions.pop(0)] = bool(byte)
                continue
            os.close(pipe)
            os.waitpid(pid, 0)
            del running[pipe]
            if len(positions) > 1:  # the first of them ended the fork; the others go on without it
                waiting.append(positions[1:])
    return marked


def main() -> None:
    """Answer questions until the input ends."""
    from math_verify import parse, verify

    # Nothing a library prints may reach the pipe that carries the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    logging.disable(logging.CRITICAL)
    num_processes = int(sys.argv[1])
    limit_memory()
    ignore_interrupts()

    def compare(reference: str, answer: str) -> bool:
        # Without its own time limits: those are signal handlers, which cannot interrupt big-number arithmetic.
        gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
        return bool(gold) and bool(target) and bool(verify(gold, target, timeout_seconds=None))

    def reply(message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    for text in _WARM_UP:  # what math-verify and sympy load on first use, every fork finds loaded
        compare(text, text + "+1")
    gc.freeze()
    reply("ready")
    for line in sys.stdin:
        seconds, run_length, pairs = json.loads(line)
        reply(mark_all(compare, pairs, seconds, run_length, num_processes))


if __name__ == "__main__":
    main()
