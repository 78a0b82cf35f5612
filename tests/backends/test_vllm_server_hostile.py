"""What a server says is believed only where it fits: everything else is one line with the address, in bounded time."""

import copy
import gzip
import json
import math
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from fake_vllm_server import FakeVLLM, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_lightning.backends.hf import HFStudent
from opd_lightning.backends.vllm.answers import UnfitAnswer
from opd_lightning.backends.vllm.server import Connection, ServerUnreachable, VLLMServerEngine, VLLMServerTeacher
from opd_lightning.interfaces import Problem, Prompt, Rollout, Sampling, ScoreRequest
from opd_lightning.rollouts.batching import collate

CPU = torch.device("cpu")
SAMPLING = Sampling(max_new_tokens=4)
PROMPT = Prompt(Problem("p", (), ""), (9, 10, 11), (0,))
ROLLOUT = Rollout(
    PROMPT.problem, torch.tensor([9, 10]), torch.tensor([11, 12, 3]), torch.zeros(3), finished=True, seed=0
)
IMPATIENT = {"patience": 0.01, "max_answer_mib": 1}
OK = b"HTTP/1.1 200 OK\r\n"
ESCAPES = "\x1b]0;owned\x07\x1b[31mred\u202e"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("served"), make_model(seed=4), make_tokenizer())


@pytest.fixture(scope="module")
def student(folder):
    return HFStudent(str(folder))


@contextmanager
def teacher_of(student, folder, **options):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        teacher = VLLMServerTeacher(Connection([url], **(IMPATIENT | options)))
        teacher.setup(student, torch.nn.Module(), CPU)
        yield teacher, fake, url
        fake.raw = None
        teacher.close()


@contextmanager
def engine_of(student, folder, **options):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = VLLMServerEngine(Connection([url], **(IMPATIENT | options)))
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        yield engine, fake, url
        engine.close()


def score(teacher, k=2):
    scores = teacher.score(collate([ROLLOUT], 0), ScoreRequest(top_k=k))
    return scores.sampled(), *scores.topk(k)


def assert_one_line(error, url):
    message = str(error)
    assert message.isprintable() and url in message and len(message) < 1000, message


def whole(body, *headers):
    return [
        OK + b"".join(header + b"\r\n" for header in (*headers, b"Content-Length: %d" % len(body))) + b"\r\n" + body
    ]


NO_ANSWERS = {
    "HTML": (whole(b"<html>Please log in</html>"), "no JSON"),
    "cut JSON": (whole(b'{"choices": [{"prompt_lo'), "no JSON"),
    "no UTF-8": (whole(b'{"choices": "\xff"}'), "no JSON"),
    "deep JSON": (whole(b"[" * 100_000), "no JSON"),
    "a long number": (whole(b'{"choices": ' + b"9" * 10_000 + b"}"), "no JSON"),
    "null": (whole(b"null"), "without choices"),
    "empty": (whole(b""), "an empty answer"),
    "no choices": (whole(b'{"choices": []}'), "without choices"),
    "a choice that is none": (whole(b'{"choices": [7]}'), "without choices"),
    "redirect": (
        [b"HTTP/1.1 302 Found\r\nLocation: http://else/\r\nContent-Length: 0\r\n\r\n"],
        "HTTP 302: a redirect",
    ),
    "escapes": ([OK.replace(b"200", b"503") + b"\r\n" + ESCAPES.encode()], "HTTP 503: .*red"),
    "escapes in the status": ([ESCAPES.encode() + b"\r\n\r\n"], "RemoteProtocolError"),
    "cut short": ([OK + b"Content-Length: 100\r\n\r\n{"], "RemoteProtocolError"),
    "too large": ([OK + b"\r\n", *[b"[" * 2**16] * 17], "more than 1 MiB"),
    "packed": (whole(gzip.compress(b" " * 2**24), b"Content-Encoding: gzip"), "or a packed one"),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_ends_in_one_line(student, folder, name):
    raw, reason = NO_ANSWERS[name]
    with teacher_of(student, folder) as (teacher, fake, url):
        fake.raw, num_before = raw, len(fake.requests)
        with pytest.raises(ServerUnreachable, match=reason) as caught:
            score(teacher)
        assert_one_line(caught.value, url)
        assert len(fake.requests) > num_before  # how often it is asked again is a matter of time; see the next test


def test_what_is_no_answer_is_forgiven_when_an_answer_follows(student, folder):
    with teacher_of(student, folder, patience=100.0) as (teacher, fake, _):
        expected = score(teacher)

        class Once:
            def __iter__(self):
                fake.raw = None
                return iter(whole(b"<html>Restarting</html>"))

        fake.raw = Once()
        assert all(map(torch.equal, score(teacher), expected))


@pytest.mark.parametrize("head", [b"", OK, OK + b"Content-Length: 1000\r\n\r\n", OK + b"\r\n"])
def test_a_byte_now_and_then_does_not_keep_a_run_waiting(student, folder, head):
    with teacher_of(student, folder, timeout=0.3) as (teacher, fake, url):
        is_over = threading.Event()

        def trickle():
            yield head
            while not is_over.wait(0.02):
                yield b"x"

        class Trickle:
            def __iter__(self):
                return trickle()

        fake.raw = Trickle()
        with pytest.raises(ServerUnreachable, match=r"no whole answer within 0\.3 s") as caught:
            score(teacher)
        is_over.set()
        assert_one_line(caught.value, url)


def test_a_line_that_was_hung_up_on_is_used_again(student, folder):
    with teacher_of(student, folder, timeout=0.3, patience=100.0) as (teacher, fake, _):
        expected = score(teacher)
        gate = fake.gate = threading.Event()

        def open_for_all():
            fake.gate = None
            gate.set()

        threading.Timer(0.4, open_for_all).start()
        assert all(map(torch.equal, score(teacher), expected))


def entry(**changes):
    def tamper(choice):
        choice["prompt_logprobs"][3] = {"12": {"logprob": -1.0}, "20": {"logprob": -2.0}} | changes

    return tamper


def value(log_prob):
    return entry(**{"12": {"logprob": log_prob}})


UNFIT_SCORES = {
    "positive": (value(0.5), "0.5 as a log-probability"),
    "NaN": (value(math.nan), "nan as a log-probability"),
    "infinite": (value(-math.inf), "-inf as a log-probability"),
    "huge": (value(-(10**400)), "as a log-probability"),
    "beyond float32": (value(-1e300), "as a log-probability"),
    "text": (value(ESCAPES), "as a log-probability"),
    "missing": (entry(**{"12": {}}), "None as a log-probability"),
    "no mapping": (entry(**{"12": None}), "None as a log-probability"),
    "an id that is none": (entry(**{"-7": {"logprob": -1.0}}), "'-7', which is no token id"),
    "an id twice": (entry(**{"012": {"logprob": -0.1}}), "'012', which is no token id"),
    "an id beyond the vocabulary": (entry(**{"81": {"logprob": -0.1}}), "81 likely, which is beyond"),
    "a very long id": (entry(**{"9" * 9999: {"logprob": -0.1}}), "no token id"),
    "no entry": (lambda choice: choice["prompt_logprobs"].__setitem__(3, None), "no scores for token 12"),
    "fewer": (lambda choice: choice["prompt_logprobs"].pop(), "scored 4 tokens of a sequence of 5"),
    "none": (lambda choice: choice.pop("prompt_logprobs"), "no prompt_logprobs"),
}


def tampering(change):
    def tamper(path, answer):
        if path == "/v1/completions":
            change(answer["choices"][0])
        return answer

    return tamper


@pytest.mark.parametrize("name", UNFIT_SCORES)
def test_scores_that_do_not_fit_are_refused(student, folder, name):
    change, reason = UNFIT_SCORES[name]
    with teacher_of(student, folder) as (teacher, fake, url):
        fake.tamper, num_before = tampering(change), len(fake.requests)
        with pytest.raises(ValueError, match=reason) as caught:
            score(teacher)
        if "vocabulary" not in name:
            assert_one_line(caught.value, url)
        assert len(fake.requests) == num_before + 1


def response(token_ids, log_probs):
    def change(choice):
        choice["token_ids"], choice["logprobs"] = token_ids, {"token_logprobs": log_probs}

    return change


UNFIT_RESPONSES = {
    "an id beyond the vocabulary": (response([9, VOCAB_SIZE, 9, 9], [-1.0] * 4), "sampled the token 81; .* 0 to 80"),
    "a negative id": (response([9, -1, 9, 9], [-1.0] * 4), "sampled the token -1"),
    "an id that is none": (response([9, True, 9, 9], [-1.0] * 4), "sampled the token True"),
    "too long": (response([9] * 5, [-1.0] * 5), "of 5 tokens; at most 4 were asked for"),
    "after a stop": (response([9, 3, 9, 9], [-1.0] * 4), "went on after a token that ends a response"),
    "fewer log-probs": (response([9] * 4, [-1.0] * 3), "3 log-probabilities for 4 tokens"),
    "positive": (response([9] * 4, [-1.0, -1.0, 0.5, -1.0]), "0.5 as a log-probability"),
    "no number": (response([9] * 4, [-1.0, None, -1.0, -1.0]), "None as a log-probability"),
    "no list": (response("abcd", [-1.0] * 4), "are no lists"),
    "no token ids": (lambda choice: choice.pop("token_ids"), "without token_ids"),
}


@pytest.mark.parametrize("name", UNFIT_RESPONSES)
def test_responses_that_do_not_fit_are_refused(student, folder, name):
    change, reason = UNFIT_RESPONSES[name]
    with engine_of(student, folder) as (engine, fake, url):
        fake.tamper = tampering(change)
        with pytest.raises(UnfitAnswer, match=reason) as caught:
            engine.generate([PROMPT], SAMPLING)
        assert_one_line(caught.value, url)


@pytest.mark.parametrize("log_prob", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_the_students_own(student, folder, log_prob):
    with engine_of(student, folder) as (engine, fake, _):
        fake.tamper = tampering(response([9] * 4, [-1.0, log_prob, -1.0, -1.0]))
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            engine.generate([PROMPT], SAMPLING)


# ------------------------------------------------------------------------------------------------------ anything at all


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["logprob", ESCAPES])
)
ANYTHING = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def paths_of(node, path=()):
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def replaced(answer, path, other):
    if not path:
        return other
    changed = copy.deepcopy(answer)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = other
    return changed


def hostile(data):
    """Replaces one part of every completion by anything, or sends anything."""
    if data.draw(st.booleans()):
        body = data.draw(st.binary(max_size=40) | ANYTHING.map(lambda other: json.dumps(other).encode()))
        return {"raw": whole(body)}
    other, number = data.draw(ANYTHING), data.draw(st.integers(0, 10_000))

    def tamper(path, answer):
        paths = list(paths_of(answer))
        return replaced(answer, paths[number % len(paths)], other)

    return {"tamper": tamper}


FEW = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
def test_a_teacher_gives_sound_scores_or_one_line(student, folder):
    with teacher_of(student, folder) as (teacher, fake, url):

        @FEW
        @given(st.data())
        def check(data):
            fake.__dict__.update({"raw": None, "tamper": lambda path, answer: answer} | hostile(data))
            try:
                sampled, ids, log_probs = score(teacher)
            except (ServerUnreachable, UnfitAnswer) as error:
                assert_one_line(error, url)
            else:
                assert sampled.shape == (3,) and ids.shape == log_probs.shape == (3, 2)
                assert ids.min() >= 0 and ids.max() < VOCAB_SIZE
                for values in (sampled, log_probs):
                    assert values.isfinite().all() and values.max() <= 1e-3

        check()


@pytest.mark.slow
def test_an_engine_gives_sound_rollouts_or_one_line(student, folder):
    with engine_of(student, folder) as (engine, fake, url):

        @FEW
        @given(st.data())
        def check(data):
            fake.__dict__.update({"raw": None, "tamper": lambda path, answer: answer} | hostile(data))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a server that seems to have lost its weights is given them again
                try:
                    (rollout,) = engine.generate([PROMPT], SAMPLING)
                except (ServerUnreachable, UnfitAnswer, ConnectionError) as error:
                    assert_one_line(error, url)
                except FloatingPointError:
                    pass
                else:
                    assert len(rollout.response_ids) == len(rollout.log_probs) <= 4
                    assert rollout.response_ids.max() < VOCAB_SIZE and rollout.log_probs.max() <= 1e-3
                    assert rollout.log_probs.isfinite().all()

        check()


# ------------------------------------------------------------------------------------------------------- the terminal


def test_a_password_is_sent_and_never_shown(student, folder):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        secret = url.replace("http://", "http://user:very-secret@")
        connection = Connection([secret], **IMPATIENT)
        VLLMServerTeacher(connection).preflight(student)
        assert set(fake.authorizations) == {"Basic dXNlcjp2ZXJ5LXNlY3JldA=="}
        fake.raw = whole(b"null")
        engine = VLLMServerEngine(connection)
        for model in (engine, VLLMServerTeacher(connection)):
            with pytest.raises(ServerUnreachable) as caught:
                model.preflight(student)
            assert_one_line(caught.value, url)
            assert "secret" not in str(caught.value)
        assert "secret" not in repr(connection)


@pytest.mark.parametrize(
    "url",
    [
        "user:secret@host",
        "http://user:secret@host/v1",
        "http://user:se#cret@host",
        "http://user:secret@host:port",
        "http://host?key=secret",
        "http://user:secret@",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match=r"connection\.urls: expected addresses such as") as caught:
        Connection([url])
    assert "cret" not in str(caught.value)


def test_the_same_address_with_another_password_is_there_twice():
    with pytest.raises(ValueError, match=r"there twice: \['http://host', 'http://host'\]"):
        Connection(["http://a:secret@host", "http://b:secret@host"])


@pytest.mark.parametrize("key", ["secret\n", "s\x1becret", "sécret"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key):
    with pytest.raises(ValueError, match=r"connection\.api_key: expected ASCII") as caught:
        Connection(["http://host"], api_key=key)
    assert "cret" not in str(caught.value)


def test_a_time_that_no_clock_takes_is_refused():
    with pytest.raises(ValueError, match=r"connection\.timeout: expected at most"):
        Connection(["http://host"], timeout=1e300)
