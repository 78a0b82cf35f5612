"""What math-verify decides, in a process that no answer can hang, crash or outlive."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_lightning.tasks import marking
from opd_lightning.tasks.marking import AnswerChecker

HANGS = "9^{9^{9^9}}"


@pytest.fixture
def checker():
    checker = AnswerChecker(seconds_per_answer=0.5)
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def kept_checker():
    """The same, with one process for all who ask; it takes seconds to start."""
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


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
    checker.close()


def test_all_pairs_are_marked_and_equal_pairs_once(shared_checker, monkeypatch):
    asked = []
    ask = AnswerChecker._ask
    monkeypatch.setattr(
        AnswerChecker, "_ask", lambda self, pairs, *rest: asked.extend(pairs) or ask(self, pairs, *rest)
    )
    references, answers = ["x+1", "4", "x+1", "x+1"], ["1+x", "4", "1+x", "2+x"]
    assert shared_checker.equal_all(references, answers) == [True, True, True, False]
    assert asked == [("x+1", "1+x"), ("x+1", "2+x")]


def test_many_pairs_keep_their_order(shared_checker):
    numbers = range(40)
    verdicts = shared_checker.equal_all([f"x+{n}" for n in numbers], [f"{n + n % 3 // 2}+x" for n in numbers])
    assert verdicts == [n % 3 != 2 for n in numbers]


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
def test_hostile_answers_are_wrong_in_bounded_time(kept_checker, answer):
    assert kept_checker.equal("x+1", "1+x")
    started = time.perf_counter()
    assert not kept_checker.equal("5", answer)
    assert time.perf_counter() - started < 10 * kept_checker.seconds_per_answer + 2
    assert kept_checker.equal("x+1", "1+x"), "the next answer is marked again"


@pytest.mark.slow
def test_unfinished_answers_are_wrong_with_one_warning_and_cost_the_others_nothing(checker):
    assert checker.equal("x+1", "1+x")
    pid = worker_pid(checker)
    match = r"did not finish with 1 answers \(first: '9\^.*grade 0.* Each had 0.5 s"
    with pytest.warns(UserWarning, match=match) as warned:
        assert checker.equal_all(["5", "x+1", "5"], [HANGS, "1+x", HANGS]) == [False, True, False]
        assert not checker.equal("5", HANGS + "+1")
    assert len(warned) == 1
    assert worker_pid(checker) == pid
    assert children_of(pid) == []


@pytest.mark.slow
def test_slow_answers_share_the_time_of_a_step():
    checker = AnswerChecker(seconds_per_answer=60, seconds_per_step=1.5, num_processes=2)
    answers = [f"{n}^{{9^{{9^9}}}}" for n in range(2, 5)]
    match = "3 answers .*count as wrong.*3 slow answers had to share task.seconds_per_step=1.5, 0.5 s each"
    for _ in range(2):  # said every time: the setting can be raised
        with pytest.warns(UserWarning, match=match):
            assert checker.equal_all(["5"] * 3 + ["x+1"], [*answers, "1+x"]) == [False] * 3 + [True]
    checker.close()


@pytest.mark.slow
def test_killed_process_is_replaced_and_its_answers_marked_again(kept_checker):
    assert kept_checker.equal("x+1", "1+x")
    os.kill(worker_pid(kept_checker), signal.SIGKILL)
    assert kept_checker.equal("x+1", "1+x")


def test_a_process_that_is_killed_again_and_again_is_an_error(monkeypatch, tmp_path):
    dying = tmp_path / "marking_worker.py"
    dying.write_text("""print('"ready"', flush=True); input()""")
    monkeypatch.setattr("opd_lightning.tasks.marking._WORKER_SCRIPT", dying)
    with pytest.raises(RuntimeError, match=r"was killed twice while it marked 1 answers\..*fewer task\.num_processes"):
        AnswerChecker().equal("x+1", "1+x")


@pytest.mark.slow
def test_an_interrupted_question_is_not_answered_later(kept_checker, monkeypatch):
    assert kept_checker.equal("x+1", "1+x")
    pid = worker_pid(kept_checker)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept_checker._worker, "_next_reply", interrupted)
        kept_checker.equal("x+1", "2+x")
    assert not is_alive(pid)
    assert kept_checker.equal("x+1", "1+x")


SIDE_BY_SIDE = """
import os, runpy, sys
mark_all = runpy.run_path({worker!r})["mark_all"]

def meet(mode, path):  # a pipe with a name opens only once both of its ends are held
    with open(path, mode):
        return mode == "rb"

print(mark_all(meet, [["rb", {fifo!r}], ["wb", {fifo!r}]] * 2, 5.0, 1, 2))
"""


def test_answers_are_marked_side_by_side(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    worker = Path(marking.__file__).with_name("marking_worker.py")
    script = SIDE_BY_SIDE.format(worker=str(worker), fifo=str(tmp_path / "fifo"))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.read() == "[True, False, True, False]\n"


@pytest.mark.slow
def test_signals_to_the_whole_job_do_not_end_it(kept_checker):
    assert kept_checker.equal("x+1", "1+x")
    pid = worker_pid(kept_checker)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    assert kept_checker.equal("x+1", "1+x")
    assert worker_pid(kept_checker) == pid


def test_a_process_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "marking_worker.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr("opd_lightning.tasks.marking._WORKER_SCRIPT", broken)
    with pytest.raises(RuntimeError, match=r"marking_worker.py\) did not start: exit code 3.*math-verify"):
        AnswerChecker().equal("x+1", "1+x")


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="seconds_per_answer: expected a positive number of seconds, got 0"):
        AnswerChecker(0)


@pytest.mark.slow
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda checker: pickle.loads(pickle.dumps(checker))])
def test_copies_start_their_own_process(kept_checker, duplicate):
    assert kept_checker.equal("x+1", "1+x")
    other = duplicate(kept_checker)
    assert other._worker is None
    assert other.equal("x+1", "1+x")
    assert worker_pid(other) != worker_pid(kept_checker)
    other.close()
    assert kept_checker.equal("x+2", "2+x")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_copy_marks_and_leaves_its_parents_process_alone(kept_checker):
    assert kept_checker.equal("x+1", "1+x")
    pid = worker_pid(kept_checker)
    child = os.fork()
    if child == 0:
        good = kept_checker.equal("x+1", "1+x") and worker_pid(kept_checker) != pid
        kept_checker.close()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept_checker.equal("x+2", "2+x")
    assert worker_pid(kept_checker) == pid


MARK_AND_REPORT = """
import signal, sys
from opd_lightning.tasks.marking import AnswerChecker
checker = AnswerChecker({seconds})
assert checker.equal("x+1", "1+x")
print(checker._worker._process.pid, flush=True)
{then}
"""


@pytest.mark.slow
def test_end_of_the_interpreter_ends_the_process(forks, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(MARK_AND_REPORT.format(seconds=3, then="sys.exit()"))
    done = forks.run(program)
    assert done.returncode == 0
    assert not is_alive(int(done.stdout))
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("then", ["signal.pause()", f"checker.equal('5', '{HANGS}')"], ids=["idle", "busy"])
def test_process_and_forks_do_not_outlive_a_killed_trainer(forks, tmp_path, then, number):
    program = tmp_path / "program.py"
    program.write_text(MARK_AND_REPORT.format(seconds=1000, then=then))
    trainer = forks.start(program)
    deadline, pids = time.monotonic() + 300, []
    while len(pids) < (2 if HANGS in then else 1):
        assert trainer.poll() is None and time.monotonic() < deadline, trainer.stderr
        if trainer.stdout.endswith("\n"):
            pids = [int(trainer.stdout), *children_of(int(trainer.stdout))]
        time.sleep(0.05)
    trainer.send_signal(number)
    assert trainer.wait() != 0
    for process in pids:
        wait_until_gone(process)


@pytest.mark.slow
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
