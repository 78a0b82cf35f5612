"""The processes that other tests take for real ones end as real ones do."""

import os
import signal
import time

import pytest

PROGRAM = """
import os, sys, signal, threading
print(sys.argv[1:], os.getcwd(), __name__)
threading.Thread(target=print, args=["said by a thread"]).start()
if sys.argv[1] == "ends":
    os.kill(os.getpid(), signal.SIGHUP)
    raise RuntimeError("broken")
if sys.argv[1] == "waits with another":
    os.fork()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pause()
"""


def is_there(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_fork_is_a_process_like_another(forks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = forks.run(program, "ends", 7, cwd=tmp_path, ignored="SIGHUP")
    assert done.returncode == 1
    assert done.stdout == f"['ends', '7'] {tmp_path} __main__\nsaid by a thread\n"
    assert done.stderr.endswith("RuntimeError: broken\n") and "Traceback" in done.stderr
    assert forks.run(program, "ends").returncode == -signal.SIGHUP

    process = forks.start(program, "waits")
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL == process.poll()

    hangs = forks.run(program, "waits with another", seconds=0.5)
    assert hangs.returncode == 124
    deadline = time.monotonic() + 60
    while is_there(hangs.pid):  # those that it had started, too
        assert time.monotonic() < deadline
