"""`VLLMServerEngine` against a fake server that computes with a tiny model."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from fake_vllm_server import FakeVLLM, serve

from opd_lightning.backends.hf import HFEngine, HFStudent, LoraSettings
from opd_lightning.backends.vllm.server import (
    Connection,
    FileTransfer,
    NCCLTransfer,
    ServerUnreachable,
    VLLMServerEngine,
    exchange,
)
from opd_lightning.interfaces import Problem, Prompt, Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
WARM = Sampling(max_new_tokens=8, temperature=0.7)


BOTH_HEADS = pytest.mark.parametrize(
    "folder", [pytest.param(0, marks=pytest.mark.slow), 14], indirect=True, ids=["exact head", "padded head"]
)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A student, whose head has rows beyond the vocabulary unless the test asks otherwise."""
    model = make_model(seed=4, vocab_size=VOCAB_SIZE + getattr(request, "param", 14))
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] *= 0.1  # trained models give padding rows next to nothing
    return save_folder(tmp_path_factory.mktemp("student"), model, make_tokenizer())


@pytest.fixture
def student(folder):
    return HFStudent(str(folder))


def make_engine(*urls, **options):
    return VLLMServerEngine(Connection(list(urls), patience=3.0), **options)


def make_prompts(student, num=3):
    prompts = []
    for i in range(num):
        problem = Problem(uid=f"p{i}", messages=({"role": "user", "content": "ab" * (i + 1)},), answer="")
        prompts.append(Prompt(problem, tuple(student.tokenizer.render(problem.messages)), (2 * i, 2 * i + 1)))
    return prompts


def perturb(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


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
        assert (a.finished, a.text, a.seed) == (b.finished, b.text, b.seed)
    return tokens(actual)


@BOTH_HEADS
@pytest.mark.parametrize(
    "lora",
    [None, pytest.param(LoraSettings(r=2, target_modules=["q_proj"]), marks=pytest.mark.slow)],
    ids=["whole", "lora"],
)
def test_rollouts_come_from_the_pushed_weights(folder, lora, tmp_path):
    student = HFStudent(str(folder), lora=lora)
    model = student.load()
    fakes = [FakeVLLM(folder), FakeVLLM(folder)]
    with serve(fakes[0]) as first, serve(fakes[1]) as second:
        engine = make_engine(first, second, transfer=FileTransfer(str(tmp_path)))
        engine.setup(student, CPU)
        outputs = []
        for version in range(3):
            engine.sync(model, version)
            outputs.append(assert_greedy_is_the_same(student, model, engine))
            perturb(model, version)
        engine.close()
    assert outputs[0] != outputs[1] != outputs[2]
    assert list(tmp_path.iterdir()) == []
    for fake in fakes:
        assert fake.weight_version.endswith(":2") and not fake.is_paused
        paths = [path for path, _ in fake.requests]
        assert paths.count("/reset_prefix_cache") == paths.count("/finish_weight_update") == 3


@BOTH_HEADS
def test_requests_say_everything(student, folder):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        fake.requests.clear()
        rollouts = engine.generate(make_prompts(student), WARM)
        engine.close()
    bodies = [body for path, body in fake.requests if path == "/v1/completions"]
    assert sorted(body["seed"] for body in bodies) == [rollout.seed for rollout in rollouts] == list(range(6))
    for body in bodies:
        assert body["ignore_eos"] and body["stop_token_ids"] == list(student.tokenizer.stop_ids)
        assert (body["temperature"], body["top_p"], body["top_k"], body["logprobs"]) == (0.7, 1.0, 0, 0)
        rows = student.config.vocab_size
        assert set(body.get("logit_bias", {})) == {str(i) for i in range(VOCAB_SIZE, rows)}


def test_rollouts_are_told_of_as_they_come(student, folder):
    with serve(FakeVLLM(folder)) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        told = []
        rollouts = engine.generate(make_prompts(student), WARM, told.append)
        engine.close()
    assert sorted(rollout.seed for rollout in told) == [rollout.seed for rollout in rollouts]


def test_weights_that_a_server_has_are_not_sent_again(student, folder):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        model = student.load()
        engine.sync(model, 0)
        fake.requests.clear()
        engine.sync(model, 0)
        assert fake.requests == []
        engine.sync(model, 1)
        assert "/update_weights" in [path for path, _ in fake.requests]
        engine.close()


@pytest.mark.slow
def test_a_restarted_server_is_given_the_weights_again(student, folder):
    fake = FakeVLLM(folder)
    model = student.load()
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        perturb(model, 1)
        engine.sync(model, 0)
        expected = assert_greedy_is_the_same(student, model, engine)
    fresh = FakeVLLM(folder)  # with the weights it was started with
    with serve(fresh, port=int(url.rpartition(":")[2])):
        assert assert_greedy_is_the_same(student, model, engine) == expected
        assert [path for path, _ in fresh.requests].count("/update_weights") == 1
    engine.close()


@pytest.mark.slow
def test_another_run_on_the_same_server_is_noticed(student, folder):
    fake = FakeVLLM(folder)
    model = student.load()
    with serve(fake) as url:
        ours, theirs = make_engine(url), make_engine(url)
        for engine in (ours, theirs):
            engine.setup(student, CPU)
        ours.sync(model, 0)
        other = student.load()
        perturb(other, 1)
        theirs.sync(other, 0)
        assert_greedy_is_the_same(student, model, ours)
        ours.close()
        theirs.close()


def test_a_server_that_fails_while_taking_weights_is_not_left_paused(student, folder):
    fake = FakeVLLM(folder)
    model = student.load()
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        engine.sync(model, 0)
        update, fake.update_weights = fake.update_weights, lambda info: {}["lost"]
        fake.requests.clear()
        engine.connection.__dict__["patience"] = 0.3
        with pytest.raises(ServerUnreachable, match=f"engine: no answer for 0.3 s from {url}"):
            engine.sync(model, 1)
        assert [path for path, _ in fake.requests][-1] == "/resume"
        fake.update_weights = update
        engine.close()


def test_a_server_without_weight_endpoints_is_refused(student, folder):
    with (
        serve(FakeVLLM(folder, weight_transfer=False)) as url,
        pytest.raises(ValueError, match=f"engine: {url} has no weight-transfer endpoints .*VLLM_SERVER_DEV_MODE=1"),
    ):
        make_engine(url).setup(student, CPU)


def test_untempered_log_probs_are_refused(student, folder):
    fake = FakeVLLM(folder)
    fake.logprobs_mode = "raw_logprobs"
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        with pytest.raises(ValueError, match="Start it with --logprobs-mode processed_logprobs"):
            engine.sync(student.load(), 0)


def test_weights_that_went_astray_are_noticed(student, folder, monkeypatch):
    honest = HFStudent.named_weights
    monkeypatch.setattr(
        HFStudent, "named_weights", lambda *a: (pair for pair in honest(*a) if "layers.1.mlp" not in pair[0])
    )
    with serve(FakeVLLM(folder)) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        model = student.load()
        perturb(model, 1)
        with pytest.raises(ValueError, match="engine: vLLM and the student disagree about the same tokens"):
            engine.sync(model, 0)


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.max_mean_mismatch: expected a positive number, got 0"):
        make_engine("http://localhost:1", max_mean_mismatch=0)
    with pytest.raises(ValueError, match=r"transfer\.folder: expected a folder, got '.*absent'"):
        FileTransfer(str(tmp_path / "absent"))
    for transfer in (FileTransfer, NCCLTransfer):
        with pytest.raises(ValueError, match=r"transfer\.dtype: expected float32, .*, got 'int8'"):
            transfer(dtype="int8")


def test_a_transfer_may_be_in_another_dtype(student, folder, tmp_path):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = make_engine(url, transfer=FileTransfer(str(tmp_path), "bfloat16"))
        engine.setup(student, CPU)
        model = student.load()
        engine.sync(model, 0)
        engine.close()
    weight = fake.model.state_dict()["model.norm.weight"]
    name, mine = "model.layers.0.self_attn.q_proj.weight", dict(model.named_parameters())
    assert torch.equal(fake.model.state_dict()[name], mine[name].bfloat16().float()) and weight.dtype == torch.float32


@pytest.mark.parametrize("aborts", [[2], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_answers_that_are_called_off_are_asked_for_again(student, folder, aborts):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        expected = engine.generate(make_prompts(student), WARM)
        fake.aborts = list(aborts)
        told = []
        rollouts = engine.generate(make_prompts(student), WARM, told.append)
        engine.close()
    assert not fake.aborts and tokens(rollouts) == tokens(expected)
    assert all(rollout.finished or len(rollout.response_ids) == WARM.max_new_tokens for rollout in told)


def test_servers_that_never_finish_are_given_up(student, folder):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        fake.aborts = [1] * 1000
        with pytest.raises(ConnectionError, match=rf"engine: {url} lost .* 5 times in a row.*servers of its own"):
            engine.generate(make_prompts(student), WARM)
        engine.close()


def test_a_server_that_was_refused_is_checked_again(student, folder, monkeypatch):
    honest = HFStudent.named_weights
    model = student.load()
    perturb(model, 1)
    with serve(FakeVLLM(folder)) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        monkeypatch.setattr(
            HFStudent, "named_weights", lambda *a: (pair for pair in honest(*a) if "layers.1.mlp" not in pair[0])
        )
        for _ in range(2):
            with pytest.raises(ValueError, match="disagree"):
                engine.sync(model, 0)
        monkeypatch.setattr(HFStudent, "named_weights", honest)
        engine.sync(model, 0)
        engine.close()


def test_an_interrupt_calls_off_what_a_server_is_still_generating(student, folder):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        engine = make_engine(url)
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        fake.gate = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(engine.generate, make_prompts(student), WARM)
            assert fake.has_begun.wait(100)
            engine.interrupt()
            with pytest.raises((ConnectionError, CancelledError)):
                future.result(50)  # the server has not answered yet
        engine.close()


def test_a_server_that_is_closed_just_before_it_is_asked_is_one_that_does_not_answer(monkeypatch):
    server = exchange.Server("http://127.0.0.1:9", api_key=None, timeout=1.0, max_in_flight=1, max_mib=1)
    ask = exchange._Line.exchange

    def ask_when_closed(line, *request):
        server.close()
        return ask(line, *request)

    monkeypatch.setattr(exchange._Line, "exchange", ask_when_closed)
    with pytest.raises(exchange.FailedAttempt, match="closed here"):
        server.ask("/health")


@pytest.mark.parametrize(("sampling", "known"), [(WARM, True), (GREEDY, True), (Sampling(top_p=0.9), False)])
def test_it_says_whether_log_probs_will_be_known(sampling, known):
    assert make_engine("http://localhost:1").knows_log_probs(sampling) == known


def test_set_up_may_be_tried_again(student, folder):
    fake = FakeVLLM(folder)
    with serve(fake) as url:
        fake.failures = [0] * 1000
        engine = VLLMServerEngine(Connection([url], patience=0.2))
        with pytest.raises(ServerUnreachable):
            engine.setup(student, CPU)
        fake.failures = []
        engine.setup(student, CPU)
        engine.sync(student.load(), 0)
        assert engine.context_length == fake.max_model_len
        engine.close()
