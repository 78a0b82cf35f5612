"""What others send: answers of hostile servers, and texts of models that no marker was made for."""

import time
import warnings

import pytest
import torch
from campaign import IS_LONG, SEED
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_vllm_server_hostile import (  # noqa: F401  (two are fixtures)
    PROMPT,
    SAMPLING,
    VOCAB_SIZE,
    engine_of,
    folder,
    hostile,
    score,
    student,
    teacher_of,
)

from opd_lightning.backends.vllm.answers import UnfitAnswer
from opd_lightning.backends.vllm.server import ServerUnreachable
from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.tasks import ArithmeticTask, DataSource, MathTask

pytest_plugins = ("campaign",)
pytestmark = pytest.mark.slow
NUM_SERVERS, NUM_TEXTS = (1500, 3000) if IS_LONG else (60, 200)
MANY = settings(
    max_examples=NUM_SERVERS, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)


def is_sound(numbers):
    return bool(numbers.isfinite().all()) and (not len(numbers) or float(numbers.max()) <= 1e-3)


def ask_teacher(teacher):
    sampled, ids, log_probs = score(teacher)
    return int(ids.min()) >= 0 and int(ids.max()) < VOCAB_SIZE and is_sound(sampled) and is_sound(log_probs.flatten())


def ask_engine(engine):
    (rollout,) = engine.generate([PROMPT], SAMPLING)
    ids = rollout.response_ids.tolist()
    return len(ids) == len(rollout.log_probs) <= 4 and max(ids) < VOCAB_SIZE and is_sound(rollout.log_probs)


@pytest.mark.parametrize(("open_one", "ask"), [(teacher_of, ask_teacher), (engine_of, ask_engine)])
def test_hostile_servers(student, folder, report, open_one, ask):  # noqa: F811
    failures, num_asked = [], 0

    @seed(SEED)
    @MANY
    @given(st.data())
    def attack(data):
        nonlocal num_asked
        num_asked += 1
        fake.__dict__.update({"raw": None, "tamper": lambda path, answer: answer} | hostile(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a server that seems to have lost its weights is given them again
            try:
                if not ask(model):
                    failures.append("an unsound answer was believed")
            except (ServerUnreachable, UnfitAnswer, ConnectionError, FloatingPointError) as error:
                if not str(error).isprintable() or len(str(error)) > 1000:
                    failures.append(repr(error))
            except Exception as error:  # anything else would be a traceback
                failures.append(repr(error))

    with open_one(student, folder) as (model, fake, _):
        attack()
    report(f"hostile servers ({ask.__name__.removeprefix('ask_')})", num_asked, failures)


PIECES = [
    r"\boxed{",
    "}",
    "{",
    "^",
    "_",
    "9",
    "0",
    "x",
    "!",
    "(",
    ")",
    "[",
    "]",
    "|",
    "\\",
    r"\frac",
    r"\sqrt",
    "=",
    ",",
]
PIECES += [r"\left(", r"\begin{pmatrix}", "&", "#### ", "the answer is ", "\x00", "\ud800", "\x1b[31m", "\u202e", "∞"]
PIECES += [r"\int", r"\sum_{i=0}^{9^9}", "e^", "10^10^", "\n", " ", "½", "٣", "-", "/", ".", "%", "**", "''", "$"]
GIGANTIC = ["9" * 200_000, "(" * 50_000, r"\boxed{" * 20_000, r"\frac{" * 5_000 + "1", "x" * 10**6, "9^" * 5_000 + "9"]
GIGANTIC += [r"\boxed{" + "9^" * 50 + "9}", r"\boxed{" + r"\sqrt{" * 300 + "2" + "}" * 301, r"\boxed{1000000!}"]


def hostile_text(rng):
    if rng.random() < 0.1:
        return rng.choice(GIGANTIC)
    text = "".join(rng.choice(PIECES) for _ in range(rng.choice([1, 5, 20, 200])))
    return rf"so it is \boxed{{{text}}}" if rng.random() < 0.5 else text


def rollout_of(answer, text):
    empty = torch.zeros(0, dtype=torch.int64)
    return Rollout(Problem("p", (), answer), empty, empty, torch.zeros(0), finished=True, seed=0, text=text)


@pytest.mark.parametrize("kind", ["MathTask", "ArithmeticTask"])
def test_hostile_texts(rng, report, tmp_path, kind):
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    arithmetic = ArithmeticTask(num_train=1, num_validation=1)
    algebra = MathTask(DataSource(str(tmp_path / "sums.jsonl")), seconds_per_answer=0.5, seconds_per_step=20)
    task = algebra if kind == "MathTask" else arithmetic
    failures, size = [], 50
    for _ in range(NUM_TEXTS // size):
        texts = [hostile_text(rng) for _ in range(size)]
        rollouts = [rollout_of(rng.choice(["7", r"\frac{1}{2}", "x^2+1"]), text) for text in texts]
        rollouts += [rollout_of("2", text) for text in (r"\boxed{2}", "#### 2", r"\boxed{3}", "#### 3")]
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # answers that were given up on
                marks = task.grade_rollouts(rollouts)
        except Exception as error:  # it would be a traceback
            failures += [repr(error)[:500]] * size
            continue
        if not set(marks) <= {0.0, 1.0} or time.monotonic() - started > 300:
            failures += [f"{marks}, {time.monotonic() - started:.0f} s"] * size
        if kind == "MathTask" and marks[-4:] != [1, 1, 0, 0]:
            failures.append(f"beside hostile answers plain ones are marked {marks[-4:]}")
    report(f"hostile texts ({kind})", NUM_TEXTS, failures)
