"""Run as a program: forks one real `opd-lightning` per line of standard input, and lets accidents happen to it.

Every 64 KiB that a run writes, every flush to the disk and every rename is an event, before which a signal may be sent
or after which the disk may fail. So moments are chosen by number, not by the clock: a busy machine changes none.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

PIECE = 64 * 1024
HANGS = 900  # seconds (of a busy machine, too) after which a run is taken to hang: SIGALRM ends it
EVENTS = "events"


class Accidents:
    """Counts the events of this process and does what the order says.

    Keys of the order: `signals` [[event, signal], ...]; `cpu`, seconds of processor time after which the process is
    ended at once; `fails` [event, errno]: from then on every write fails; `read_only` [event, folder]: the next rename
    finds the disk under the folder mounted read-only; `memory`, most bytes it may have.
    """

    def __init__(self, order):
        self.signals = dict(order.get("signals", ()))
        self.fails, self.read_only = order.get("fails"), order.get("read_only")
        self.number = 0
        if "cpu" in order:  # nobody handles this one, so the kernel ends the process as SIGKILL would
            signal.setitimer(signal.ITIMER_PROF, order["cpu"])
        self._patch()

    def happen(self, is_rename=False):
        self.number += 1
        if self.number in self.signals:
            os.kill(os.getpid(), self.signals[self.number])
        if self.read_only is not None and is_rename and self.number >= self.read_only[0]:
            subprocess.run(["mount", "-o", "remount,ro", self.read_only[1]], check=True)
            self.read_only = None
        if self.fails is not None and self.number >= self.fails[0]:
            raise OSError(self.fails[1], os.strerror(self.fails[1]))

    def _patch(self):
        opened, replaced, flushed = Path.open, Path.replace, os.fsync

        def open_in_pieces(path, mode="r", *rest, **named):
            file = opened(path, mode, *rest, **named)
            return InPieces(file, self.happen) if "b" in mode and set(mode) & set("wa") else file

        def replace(path, target):
            self.happen(is_rename=True)
            return replaced(path, target)

        def fsync(handle):
            self.happen()
            flushed(handle)
            self.happen()

        Path.open, Path.replace, os.fsync = open_in_pieces, replace, fsync


class InPieces:
    def __init__(self, file, happen):
        self.file, self.happen = file, happen

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        content = memoryview(content).cast("B")
        for start in range(0, len(content), PIECE):
            self.happen()
            self.file.write(content[start : start + PIECE])
            self.file.flush()
        return len(content)


def run(order):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.alarm(HANGS)
    if "memory" in order:
        resource.setrlimit(resource.RLIMIT_AS, (order["memory"], order["memory"]))
    sys.stdin.close()
    accidents = Accidents(order)
    status = 1
    try:
        main(order["words"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        Path(EVENTS).write_text(str(accidents.number))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.argv = ["opd-lightning"]
    import_module("forks").prepare()
    main = import_module("opd_lightning.commands.cli").main
    for line in sys.stdin:
        Path(EVENTS).write_text("0")
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        _, status, used = os.wait4(pid, 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "num_events": int(Path(EVENTS).read_text())}
        print(json.dumps(answer | {"seconds": used.ru_utime + used.ru_stime}), flush=True)
