r"""The process that lets math-verify loose on what a model wrote. Run as a script, never imported.

It imports the standard library and math-verify only, so that it starts in under a second and holds no torch. One line
of JSON in, ``[reference, answer]``; one line out, ``true`` or ``false``; a first line ``"ready"`` when it can begin.
An answer that takes too much processor time kills the process where it stands, big-number arithmetic included: the
system's timer does that, not a Python handler, which would wait for the multiplication to end.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

_MAX_MEMORY_BYTES = 4 << 30


def ignore_interrupts() -> None:
    """Outlive Ctrl-C and a scheduler's signals to the whole job: the trainer ends this process when it is done."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def set_alarm(seconds: float) -> None:
    """Allow so much processor time from now on (0: any), where the system has such a timer."""
    if hasattr(signal, "ITIMER_PROF"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory() -> None:
    """Bound the address space, so that a tower of powers is a MemoryError here and not a full machine."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > _MAX_MEMORY_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, hard))


def main() -> None:
    """Answer questions until the input ends."""
    from math_verify import parse, verify

    # Nothing a library prints may reach the pipe that carries the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    logging.disable(logging.CRITICAL)
    seconds = float(sys.argv[1])
    limit_memory()
    ignore_interrupts()

    def reply(message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    reply("ready")
    for line in sys.stdin:
        reference, answer = json.loads(line)
        set_alarm(seconds)
        # Without its own time limits: those are signal handlers, which the alarm above replaces.
        gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
        verdict = bool(gold) and bool(target) and verify(gold, target, timeout_seconds=None)
        set_alarm(0)
        reply(bool(verdict))


if __name__ == "__main__":
    main()
