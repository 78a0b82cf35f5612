"""What math-verify decides, in a process that no answer can hang, crash or outlive."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from opd_lightning.tasks.marking import AnswerChecker

HANGS = "9^{9^{9^9}}"


@pytest.fixture
def checker():
    checker = AnswerChecker(seconds_per_answer=0.5)
    yield checker
    checker.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in open(f"/proc/{pid}/stat").read().split(")")[1].split()[0]


def wait_until_gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def worker_pid(checker):
    return checker._worker._process.pid


def test_plain_answers_start_no_process(checker, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert checker.equal("18", "$18.00")
    assert not checker.equal("18", "19")
    assert not checker.equal("18", "")
    assert not checker.equal("18", "(" * 1000)
    assert checker._worker is None


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("x^2+1", "1+x^2", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(2,1)", False),
        (r"\{1,2\}", r"\{2, 1\}", True),
        ("1/3", "0.3333333", True),
        ("3/2", r"1\frac{1}{2}", True),
        ("300000", r"3\times 10^5", True),
        (r"\pi", "π", True),
        ("2", "2 million", False),
        ("5", "5 x", False),
        ("5", "no idea", False),
    ],
)
def test_algebra(shared_checker, reference, answer, equal):
    assert shared_checker.equal(reference, answer) is equal


@pytest.fixture(scope="module")
def shared_checker():
    checker = AnswerChecker()
    yield checker
    assert checker.num_replaced == 0
    checker.close()


def test_all_pairs_are_marked_and_equal_pairs_once(shared_checker, monkeypatch):
    asked = []
    ask = AnswerChecker.equal
    monkeypatch.setattr(AnswerChecker, "equal", lambda self, *pair: asked.append(pair) or ask(self, *pair))
    references, answers = ["x+1", "4", "x+1", "x+1"], ["1+x", "4", "1+x", "2+x"]
    assert shared_checker.equal_all(references, answers) == [True, True, True, False]
    assert len(asked) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "9^9^9^9^9",
        HANGS,
        "9**9**9**9",
        "10^{10^{10}}",
        "99999999!",
        r"\binom{100000000}{50000000}",
        r"\sum_{i=1}^{10^9} i^i",
        "(x+y)^{1000}",
        r"\int_0^1 x^{x^{x^x}} dx",
        "{" * 240 + "1" + "}" * 240,
        "(" * 240 + "1" + ")" * 240,
        r"\frac{" * 45 + "1" + "}{2}" * 45,
        "[" * 400,
        "+".join("1" * 200),
        "9" * 500,
        "\x00\ud800\U0001f600" * 20,
    ],
)
@pytest.mark.filterwarnings("ignore:math-verify did not finish")
def test_hostile_answers_are_wrong_in_bounded_time(checker, answer):
    assert checker.equal("x+1", "1+x")
    started = time.perf_counter()
    assert not checker.equal("5", answer)
    assert time.perf_counter() - started < 10 * checker.seconds_per_answer + 2
    assert checker.equal("x+1", "1+x"), "the next answer is marked again"


@pytest.mark.slow
def test_overrunning_process_is_replaced_with_one_warning(checker):
    with pytest.warns(UserWarning, match="did not finish with the answer '9\\^") as warned:
        verdicts = [checker.equal("5", HANGS) for _ in range(2)]
    assert verdicts == [False, False]
    assert checker.num_replaced == 2
    assert len(warned) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:math-verify did not finish")
def test_killed_process_is_replaced(checker):
    assert checker.equal("x+1", "1+x")
    os.kill(worker_pid(checker), signal.SIGKILL)
    checker.equal("x+1", "1+x")
    assert checker.equal("x+1", "1+x")


def test_signals_to_the_whole_job_do_not_end_it(checker):
    assert checker.equal("x+1", "1+x")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker_pid(checker), number)
    assert checker.equal("x+1", "1+x")
    assert checker.num_replaced == 0


def test_a_process_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "marking_worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr("opd_lightning.tasks.marking._WORKER_SCRIPT", broken)
    with pytest.raises(RuntimeError, match=r"marking_worker.py\) did not start: exit code 3.*math-verify"):
        AnswerChecker().equal("x+1", "1+x")


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="seconds_per_answer: expected a positive number of seconds, got 0"):
        AnswerChecker(0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda checker: pickle.loads(pickle.dumps(checker))])
def test_copies_start_their_own_process(checker, duplicate):
    assert checker.equal("x+1", "1+x")
    other = duplicate(checker)
    assert other._worker is None
    assert other.equal("x+1", "1+x")
    assert worker_pid(other) != worker_pid(checker)
    other.close()
    assert checker.equal("x+2", "2+x")


def test_close_and_garbage_collection_end_the_process():
    checker = AnswerChecker()
    checker.equal("x+1", "1+x")
    pid = worker_pid(checker)
    checker.close()
    assert not is_alive(pid)
    checker.equal("x+1", "1+x")
    pid = worker_pid(checker)
    del checker
    assert not is_alive(pid)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_copy_marks_and_leaves_its_parents_process_alone(checker):
    assert checker.equal("x+1", "1+x")
    pid = worker_pid(checker)
    child = os.fork()
    if child == 0:
        good = checker.equal("x+1", "1+x") and worker_pid(checker) != pid
        checker.close()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert checker.equal("x+2", "2+x")
    assert worker_pid(checker) == pid


MARK_AND_REPORT = """
import sys
from opd_lightning.tasks.marking import AnswerChecker
checker = AnswerChecker({seconds})
assert checker.equal("x+1", "1+x")
print(checker._worker._process.pid, flush=True)
{then}
"""


def test_end_of_the_interpreter_ends_the_process():
    script = MARK_AND_REPORT.format(seconds=3, then="sys.exit()")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not is_alive(int(done.stdout))
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("then", ["sys.stdin.read()", f"checker.equal('5', '{HANGS}')"], ids=["idle", "busy"])
def test_process_does_not_outlive_a_killed_trainer(then):
    script = MARK_AND_REPORT.format(seconds=1.5, then=then)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        pid = int(trainer.stdout.readline())
        trainer.kill()
    wait_until_gone(pid)


def test_marking_process_loads_no_torch_and_import_loads_no_math_verify():
    script = (
        "import sys, opd_lightning.tasks, json;"
        "print(json.dumps([m for m in ('math_verify', 'sympy', 'datasets', 'pyarrow') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    checker = AnswerChecker()
    checker.equal("x+1", "1+x")
    with open(f"/proc/{worker_pid(checker)}/maps") as maps:
        assert "libtorch" not in maps.read()
    checker.close()
