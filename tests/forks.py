"""Processes that have imported everything before they start: an import of Lightning and transformers takes 10 seconds.

`forks` is the fixture for tests. Run as a program, this file imports what a run imports and then forks one process for
each order on its standard input. What happens in them is real: signals, status, output, a second process under DDP.
What they share is the hash seed of strings, what imports do and what the parser knows of classes, so some tests start
Python itself.
"""

import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

IMPORTED = (
    "torchmetrics",
    "opd_lightning.commands.cli",
    "torch.utils.tensorboard",
    "transformers.models.qwen3.modeling_qwen3",
)
PARSED = ("fit", "--config", "@quickstart")
HANGS = 400  # seconds, of a busy machine too


class Fork:
    """What tests use of `subprocess.Popen`; the output is in files."""

    def __init__(self, ask, log, **order):
        self._ask, self._log, self.returncode = ask, log, None
        for ending in (".out", ".err"):
            log.with_suffix(ending).touch()  # they may be read before the process has begun
        self.pid = ask(log=str(log), **order)

    def poll(self):
        return self.wait(seconds=0)

    def wait(self, seconds=HANGS):
        """The status, or None."""
        if self.returncode is None:
            self.returncode = self._ask(wait=self.pid, seconds=seconds)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)  # nobody else gets this number before the status was asked for

    @property
    def stdout(self):
        return self._log.with_suffix(".out").read_text(errors="replace")

    @property
    def stderr(self):
        return self._log.with_suffix(".err").read_text(errors="replace")


class Forks:
    def __init__(self, folder):
        self._folder, self._server, self._number = folder, None, 0

    def _ask(self, **order):
        if self._server is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, *words, **options):
        """Start `opd-lightning` or a program, the first of the words.

        Options are `cwd`, the name of a signal to be `ignored` from the start (as after `nohup`), and `processes`, how
        many Lightning may make of it.
        """
        self._number += 1
        order = {"cwd": os.getcwd(), "ignored": None, "processes": 1} | options
        order |= {"words": list(map(str, words)), "cwd": str(order["cwd"]), "path": sys.path}
        order["environment"] = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return Fork(self._ask, self._folder / str(self._number), **order)

    def start_python(self, *words, **options):
        """The same, in a Python that was started for it."""
        return self.start(*words, **options, is_new=True)

    def run(self, *words, seconds=HANGS, **options):
        """Start it and wait for its end; the status of what takes longer is 124, and a signal that nobody traps."""
        process = self.start(*words, **options)
        if process.wait(seconds) is None:
            os.killpg(process.pid, signal.SIGABRT)
            process.wait()
            process.returncode = 124
        return process

    def close(self):
        if self._server is not None:
            self._server.communicate()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


# ------------------------------------------------------------------------------------------------------- as a program


def prepare():
    """Import what a run imports and parse a command, since the parser keeps what it reads of every class."""
    for name in IMPORTED:
        import_module(name)
    import_module("opd_lightning.commands.short_names").import_rooms()
    before = os.environ.copy()
    with suppress(Parsed):
        type("Parser", (ParserOnly, import_module("opd_lightning.commands.cli").OPDCLI), {})(list(PARSED))
    assert os.environ == before
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"


class Parsed(Exception):
    """The words of a command were understood."""


class ParserOnly:
    """Makes the command end before it seeds or builds anything."""

    def parse_arguments(self, *given):
        super().parse_arguments(*given)
        raise Parsed


def serve():
    """Obey orders; returns, with its order, in each process that is forked, and without at the end of the input."""
    running = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            if (answer := ended(order["wait"], order["seconds"])) is not None:
                running.discard(order["wait"])
        elif (answer := os.fork()) == 0:
            return order
        else:
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:  # of a test that failed before it had waited
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def ended(pid, seconds):
    handle = os.pidfd_open(pid)
    try:
        has_ended = select.select([handle], [], [], seconds)[0]
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if has_ended else None
    finally:
        os.close(handle)


def begin(order):
    """Make of this process what a start of Python with this order would have made, or start it."""
    os.setpgid(0, 0)  # a run that hangs is ended with those that it started
    log = Path(order["log"])
    for number, name in ((0, os.devnull), (1, log.with_suffix(".out")), (2, log.with_suffix(".err"))):
        handle = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = os.fdopen(0, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a script's background they start as ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if order["ignored"]:
        signal.signal(getattr(signal, order["ignored"]), signal.SIG_IGN)
    os.chdir(order["cwd"])
    if order.get("is_new"):
        module, *words = order["words"]
        assert module == "opd-lightning"
        os.execve(sys.executable, [sys.executable, "-m", "opd_lightning", *words], order["environment"])
    sys.path[:] = order["path"]
    set_environment(order["environment"])
    for _ in range(1, order["processes"]):
        keep_spare()


def set_environment(environment):
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    import_module("numpy").random.seed()
    ranks = import_module("lightning.fabric.utilities.rank_zero")
    ranks.rank_zero_only.rank = ranks._get_rank() or 0  # the import has looked for it


def keep_spare():
    """Fork the process that Lightning will start as the second one: it waits for its environment."""
    waiting, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(telling)
        with open(waiting) as pipe:
            environment = pipe.read()
        if not environment:  # the first one has ended
            os._exit(0)
        set_environment(json.loads(environment))
        return
    os.close(waiting)

    class Spare(subprocess.Popen):
        def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
            self.pid, self._child_created = pid, True
            with open(telling, "w") as pipe:
                json.dump(env, pipe)

    for package in ("fabric", "pytorch"):
        launcher = import_module(f"lightning.{package}.strategies.launchers.subprocess_script")
        launcher.subprocess = SimpleNamespace(Popen=Spare)


def run(words):
    import runpy

    sys.argv = words
    if words[0] == "opd-lightning":
        runpy.run_module("opd_lightning", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    prepare()
    if (order := serve()) is not None:
        begin(order)
        run(order["words"])
