"""Teacher and engine against a real vLLM server: scores, pushed weights, kill and restart."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from make_tiny_models import make_folder, make_prompts, perturb, student_log_probs
from record_server import record

sys.path.append(str(Path(__file__).parent.parent / "backends"))
from fake_vllm_server import recorded_answers

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.backends.vllm.server import Connection, VLLMServerEngine, VLLMServerTeacher
from opd_lightning.interfaces import Sampling, ScoreRequest
from opd_lightning.rollouts.batching import collate

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
WARM = Sampling(max_new_tokens=24, temperature=0.7)
FLAGS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32", "--max-logprobs", "20"),
    *("--kv-cache-memory-bytes", str(2**28), "--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"),
    *("--worker-extension-cls", "opd_lightning.backends.vllm.worker.WorkerExtension"),
    *("--weight-transfer-config", '{"backend": "opd_lightning"}'),
]


class RealServer:
    """`vllm serve` as a process; the CPU wheel's script of that name does not start."""

    def __init__(self, folder, log):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url, self.folder, self.log = f"http://127.0.0.1:{self.port}", folder, log
        self.start()

    def start(self):
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder), *FLAGS]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, seconds=900):  # a busy machine takes minutes; one that dies is noticed at once
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-4000:]
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-4000:])

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model(
        seed=2,
        hidden_size=64,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        vocab_size=VOCAB_SIZE + 3,
    )
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] *= 0.01
    return save_folder(tmp_path_factory.mktemp("served"), model, make_tokenizer())


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = RealServer(folder, tmp_path_factory.mktemp("log") / "server.txt")
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def student(folder):
    return HFStudent(str(folder))


@pytest.fixture
def engine(server, student):
    engine = VLLMServerEngine(Connection([server.url], patience=900.0))
    engine.setup(student, CPU)
    yield engine
    engine.close()


def tokens(rollouts):
    return [rollout.response_ids.tolist() for rollout in rollouts]


def assert_greedy_is_the_same(student, model, engine):
    local = HFEngine()
    local.setup(student, CPU)
    local.sync(model, 0)
    prompts = make_prompts(student)
    expected, actual = local.generate(prompts, GREEDY), engine.generate(prompts, GREEDY)
    assert tokens(actual) == tokens(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-3)
        assert (a.finished, a.text) == (b.finished, b.text)
    return tokens(actual)


def test_answers_still_have_the_recorded_form(server):
    from test_vllm_server_teacher import included, shape

    now = record(server.url)
    for name, recorded in recorded_answers().items():
        assert now[name]["status"] == recorded["status"], name
        if name not in ("models", "unknown model", "rollout"):
            assert included(shape(recorded["answer"]), shape(now[name]["answer"])), name


def test_teacher_scores_are_those_of_the_hugging_face_teacher(server, student, folder, engine):
    model = student.load()
    engine.sync(model, 0)  # the weights it was started with, whatever other tests have pushed
    rollouts = engine.generate(make_prompts(student), WARM)
    batches = [collate(rollouts[:3], 0), collate(rollouts[3:], 0)]
    local, remote = HFTeacher(str(folder), dtype="float32"), VLLMServerTeacher(Connection([server.url]))
    request = ScoreRequest(top_k=16)
    for teacher in (local, remote):
        teacher.setup(student, torch.nn.Module(), CPU)
    for batch, scores in zip(batches, remote.score_all(batches, request), strict=True):
        expected = local.score(batch, request)
        # the server normalises over padding rows too, which in this untrained model take up to half a percent
        torch.testing.assert_close(scores.sampled(), expected.sampled(), rtol=0, atol=1e-2)
        ids, log_probs = expected.topk(16)
        torch.testing.assert_close(scores.topk(16)[1], log_probs, rtol=0, atol=1e-2)
        differences = (scores.sampled()[:, None] - scores.topk(16)[1]) - (expected.sampled()[:, None] - log_probs)
        assert differences.abs().max() < 1e-4  # and the same for every token of a position
        assert (scores.topk(16)[0] == ids).float().mean() > 0.99  # ties may come in another order
    remote.close()


def test_a_smaller_max_logprobs_is_named(server, student):
    with pytest.raises(ValueError, match=r"teacher\.max_top_k=21: .*Start it with --max-logprobs 21"):
        VLLMServerTeacher(Connection([server.url]), max_top_k=21).preflight(student)


def test_another_models_tokens_are_noticed(server, tmp_path):
    characters = "\n ZYXWVUTSRQPONMLKJIHGFEDCBAzyxwvutsrqponmlkjihgfedcba0123456789.,:?!=+-*/"
    other = HFStudent(str(save_folder(tmp_path, make_model(), make_tokenizer(characters))))
    with pytest.raises(ValueError, match="other token ids: 9 is 'Z' for the student and 'a' for the server"):
        VLLMServerTeacher(Connection([server.url])).preflight(other)


def test_greedy_equals_hugging_face_before_and_after_pushes(student, engine):
    model = student.load()
    outputs = []
    for version in range(3):
        engine.sync(model, version)
        outputs.append(assert_greedy_is_the_same(student, model, engine))
        perturb(model, seed=version)
    assert outputs[0] != outputs[1] != outputs[2]


def test_sampled_log_probs_and_seeds(student, engine):
    model = student.load()
    engine.sync(model, 0)
    first, again = (engine.generate(make_prompts(student), WARM) for _ in range(2))
    assert tokens(first) == tokens(again)
    own = student_log_probs(student, model, first, WARM.temperature)
    torch.testing.assert_close(torch.cat([r.log_probs for r in first]), own, rtol=0, atol=1e-3)


def test_two_processes_that_share_a_student_train_on_the_rollouts_of_its_weights(server, folder, tmp_path):
    """A whole fit under FSDP2 with this server, and another with an engine in each process."""
    here = Path(__file__).parent
    teacher = make_folder(tmp_path / "teacher", seed=9)
    command = [sys.executable, str(here / "fsdp2_fits.py"), str(folder), str(teacher), server.url, str(tmp_path)]
    paths = [str(here.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pushes"] == [3, 0]  # one process sends what all have gathered
    for name in ("server", "colocated"):
        first, *_, last = found[name]
        assert all(step["rollout_mismatch"] < 1e-4 and step["staleness"] == 0 for step in found[name])
        assert first["rollouts"] != last["rollouts"] and len(first["rollouts"]) == 2
    assert found["server"][0]["rollouts"] == found["colocated"][0]["rollouts"]


def test_a_killed_server_that_is_started_again_goes_on_with_the_pushed_weights(server, student, engine):
    model = student.load()
    perturb(model, seed=5)
    engine.sync(model, 0)
    expected = assert_greedy_is_the_same(student, model, engine)
    server.kill()
    server.start()
    assert assert_greedy_is_the_same(student, model, engine) == expected
