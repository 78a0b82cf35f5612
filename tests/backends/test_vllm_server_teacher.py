"""`VLLMServerTeacher` against a fake server that computes with a tiny model, and the real one's recorded answers."""

import threading
from concurrent.futures import wait
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB_SIZE, make_model, make_tokenizer, save_folder
from fake_vllm_server import FakeVLLM, Refusal, recorded_answers, serve

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.backends.vllm.server import Connection, ServerUnreachable, VLLMServerTeacher
from opd_lightning.backends.vllm.server.listed_scores import read_scores
from opd_lightning.interfaces import Problem, Rollout, ScoreRequest
from opd_lightning.objectives import ListedScores
from opd_lightning.rollouts.batching import collate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("served"), make_model(seed=2, hidden_size=48), make_tokenizer())


@pytest.fixture
def fake(teacher_folder):
    return FakeVLLM(teacher_folder)


def patient(*urls, **options):
    return Connection(list(urls), **({"patience": 5.0} | options))


def make_rollouts(num=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    problem = Problem(uid="x", messages=(), answer="")
    rollouts = []
    for i in range(num):
        prompt, response = (torch.randint(7, VOCAB_SIZE, (n,), generator=generator) for n in (3 + 2 * i, 9 - i))
        rollouts.append(Rollout(problem, prompt, response, torch.zeros(len(response)), finished=True, seed=i))
    return rollouts


def make_batches(**options):
    rollouts = make_rollouts()
    return [collate(rollouts[:2], 0, **options), collate(rollouts[2:], 0, **options)]


def set_up(student, *urls, **options):
    teacher = VLLMServerTeacher(patient(*urls), **options)
    teacher.setup(student, torch.nn.Module(), CPU)
    return teacher


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_same_model_in_this_process(student, fake, teacher_folder, side):
    local = HFTeacher(str(teacher_folder), dtype="float32")
    local.setup(student, torch.nn.Module(), CPU)
    request = ScoreRequest(top_k=4)
    with serve(fake) as url:
        remote = set_up(student, url)
        for batch, scores in zip(
            make_batches(side=side), remote.score_all(make_batches(side=side), request), strict=True
        ):
            expected = local.score(batch, request)
            assert scores.num_tokens == batch.num_tokens and torch.equal(scores.response_ids, batch.tokens.ids)
            assert torch.equal(scores.slice(2, 5).response_ids, batch.tokens.ids[2:5])
            torch.testing.assert_close(scores.sampled(), expected.sampled(), rtol=0, atol=1e-4)
            ids, log_probs = expected.topk(4)
            assert torch.equal(scores.topk(4)[0], ids)
            torch.testing.assert_close(scores.topk(4)[1], log_probs, rtol=0, atol=1e-4)
            assert torch.equal(scores.slice(2, 5).topk(2)[0], ids[2:5, :2])
            assert torch.equal(scores.slice(2, 5).sampled(), scores.sampled()[2:5])
        remote.close()


def test_of_a_response_of_several_turns_the_students_own_tokens_are_scored(student, fake, teacher_folder):
    rollouts = make_rollouts(3)
    wrote = torch.arange(len(rollouts[1].response_ids)) % 3 != 1
    rollouts[1] = replace(rollouts[1], student_wrote=wrote)
    batch, request = collate(rollouts, 0), ScoreRequest(top_k=2)
    assert batch.num_tokens == sum(len(rollout.response_ids) for rollout in rollouts) - int((~wrote).sum())
    local = HFTeacher(str(teacher_folder), dtype="float32")
    local.setup(student, torch.nn.Module(), CPU)
    expected = local.score(batch, request)
    with serve(fake) as url:
        remote = set_up(student, url)
        fake.requests.clear()
        remote.prefetch(rollouts[1], request, 0)
        scores = remote.score(batch, request)
        assert len(fake.requests) == 3
        remote.close()
    torch.testing.assert_close(scores.sampled(), expected.sampled(), rtol=0, atol=1e-4)
    assert torch.equal(scores.topk(2)[0], expected.topk(2)[0])


def test_only_what_is_asked_for_travels(student, fake):
    with serve(fake) as url:
        teacher = set_up(student, url)
        fake.requests.clear()
        scores = teacher.score(make_batches()[0], ScoreRequest())
        assert scores.topk(0)[0].shape == (scores.num_tokens, 0)
        assert {body["prompt_logprobs"] for _, body in fake.requests} == {0}
        teacher.close()


def test_a_likeliest_token_is_found_whatever_the_order_and_number_of_entries():
    entry = {"7": {"logprob": -3.0}, "2": {"logprob": -0.5}, "9": {"logprob": -1.5}}
    sampled, ids, log_probs = read_scores([None, entry, entry], [1, 7, 9], [1, 2], 2)
    assert sampled.tolist() == [-3.0, -1.5]
    assert ids.tolist() == [[2, 9], [2, 9]] and log_probs.tolist() == [[-0.5, -1.5]] * 2


def test_what_is_not_offered_is_our_mistake():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    scores = ListedScores(ids[:, 0], torch.zeros(2), ids, torch.zeros(2, 3))
    for question in (lambda: scores.at(torch.zeros(2, 1)), scores.full, lambda: scores.topk(4)):
        with pytest.raises(AssertionError):
            question()


# ------------------------------------------------------------------------------------------------------------ set-up


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest(arbitrary_ids=True), "cannot give .* at ids the student chooses; it gives .* its own top 20"),
        (ScoreRequest(full_vocabulary=True), "cannot give .* the full vocabulary"),
        (ScoreRequest(top_k=21), "cannot give .* its own top 21"),
        (
            ScoreRequest(temperature=0.7),
            r"objective\.teacher_temperature=0\.7: a vLLM server scores prompts at temperature 1",
        ),
    ],
)
def test_what_a_server_cannot_give_is_refused_at_set_up(request_, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerTeacher(patient("http://localhost:1")).check(request_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, r"connection\.urls: expected at least one address"),
        ({"urls": ["localhost:8000"]}, r"connection\.urls: expected addresses such as http://localhost:8000"),
        ({"urls": ["http://localhost:8000/v1/"]}, r"connection\.urls: .*without /v1"),
        ({"urls": ["http://a", "http://a"]}, r"connection\.urls: an address is there twice"),
        ({"urls": ["http://a"], "patience": 0}, r"connection\.patience: expected a positive number, got 0"),
        ({"urls": ["http://a"], "max_in_flight": -1}, r"connection\.max_in_flight: expected a positive number, got -1"),
    ],
)
def test_a_bad_connection_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Connection(**options)


def test_a_negative_top_k_is_refused():
    with pytest.raises(ValueError, match=r"teacher\.max_top_k: expected 0 or a positive integer, got -1"):
        VLLMServerTeacher(patient("http://localhost:1"), max_top_k=-1)


def test_another_tokenizer_is_noticed_before_step_1(student, tmp_path):
    characters = "\n ZYXWVUTSRQPONMLKJIHGFEDCBAzyxwvutsrqponmlkjihgfedcba0123456789.,:?!=+-*/"
    folder = save_folder(tmp_path, make_model(seed=3), make_tokenizer(characters))
    with (
        serve(FakeVLLM(folder)) as url,
        pytest.raises(ValueError, match=r"other token ids: 9 is 'a' for the student and 'Z'"),
    ):
        set_up(student, url)


def test_a_smaller_vocabulary_is_noticed_before_step_1(student, tmp_path):
    folder = save_folder(tmp_path, make_model(seed=3, vocab_size=VOCAB_SIZE - 5), make_tokenizer())
    with serve(FakeVLLM(folder)) as url, pytest.raises(ValueError, match=f"{url} serves a model with fewer token ids"):
        set_up(student, url)


def test_a_name_that_is_not_served_is_refused(student, fake):
    with (
        serve(fake) as url,
        pytest.raises(ValueError, match=rf"teacher\.model: {url} does not serve 'other'; it serves '/"),
    ):
        set_up(student, url, model="other")


def test_a_limit_on_log_probabilities_names_the_flag(student, teacher_folder):
    with serve(FakeVLLM(teacher_folder, max_logprobs=8)) as url:
        with pytest.raises(
            ValueError, match=r"teacher\.max_top_k=20: .*Start it with --max-logprobs 20, or lower max_top_k"
        ):
            set_up(student, url)
        set_up(student, url, max_top_k=8).close()


def test_servers_must_serve_the_same(student, teacher_folder):
    with (
        serve(FakeVLLM(teacher_folder, name="one")) as first,
        serve(FakeVLLM(teacher_folder, name="two")) as second,
        pytest.raises(ValueError, match=r"teacher\.model: the servers serve different models: one, two"),
    ):
        set_up(student, first, second)


def test_a_short_context_is_told_and_longer_rollouts_are_refused(student, teacher_folder):
    assert VLLMServerTeacher(patient("http://localhost:1")).context_length is None
    with serve(FakeVLLM(teacher_folder, max_model_len=13)) as url, serve(FakeVLLM(teacher_folder)) as longer:
        teacher = VLLMServerTeacher(patient(longer, url), model=str(teacher_folder))
        teacher.preflight(student)
        assert teacher.context_length == 12
        with pytest.raises(ValueError, match=r"a rollout of 13 tokens does not fit into the server's 13"):
            list(teacher.score_all(make_batches(), ScoreRequest()))
        teacher.close()


def test_a_padding_row_among_the_likeliest_stops_the_run(student, tmp_path):
    model = make_model(seed=2, vocab_size=VOCAB_SIZE + 14)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB_SIZE:] *= 9
    with serve(FakeVLLM(save_folder(tmp_path, model, make_tokenizer()))) as url:
        teacher = set_up(student, url)
        with pytest.raises(ValueError, match=r"finds id \d+ likely, which is beyond the student's 81 tokens"):
            teacher.score(make_batches()[0], ScoreRequest(top_k=4))
        teacher.close()


# ----------------------------------------------------------------------------------------------------- life of a run


def test_all_micro_batches_are_under_way_before_the_first_is_used(student, fake):
    with serve(fake) as url:
        teacher = set_up(student, url)
        fake.requests.clear()
        fake.gate = threading.Barrier(5)  # none is answered before all are asked
        scores = teacher.score_all(make_batches(), ScoreRequest())
        next(scores)
        assert len(fake.requests) == 5 and fake.max_in_flight == 5
        next(scores)
        assert len(fake.requests) == 5
        teacher.close()


def test_rollouts_told_early_are_not_asked_for_again(student, fake):
    request = ScoreRequest(top_k=2)
    with serve(fake) as url:
        teacher = set_up(student, url)
        expected = [scores.sampled() for scores in teacher.score_all(make_batches(), request)]
        fake.requests.clear()
        early = make_rollouts()[:4]
        for rollout in [*early, early[0]]:
            teacher.prefetch(rollout, request, 0)
        scores = [scores.sampled() for scores in teacher.score_all(make_batches(), request)]
        assert len(fake.requests) == 5
        for a, b in zip(scores, expected, strict=True):
            assert torch.equal(a, b)
        fake.requests.clear()
        teacher.prefetch(early[0], request, 1)  # a coming step may already be generated while this one is scored
        list(teacher.score_all(make_batches()[:1], request))
        list(teacher.score_all(make_batches()[:1], request))  # an EffOPD score in between
        assert len(fake.requests) == 1
        teacher.prefetch(early[1], request, 2)
        assert set(teacher._early) == {1, 2}
        teacher.close()


def test_a_server_is_not_given_more_than_it_may_have(student, fake):
    with serve(fake) as url:
        teacher = VLLMServerTeacher(patient(url, max_in_flight=2))
        teacher.setup(student, torch.nn.Module(), CPU)
        fake.delay = 0.05
        assert len(list(teacher.score_all(make_batches(), ScoreRequest()))) == 2
        assert fake.max_in_flight == 2
        teacher.close()


def test_a_server_gets_no_more_when_another_is_down(student, teacher_folder):
    alive, down = FakeVLLM(teacher_folder), FakeVLLM(teacher_folder)
    with serve(alive) as url, serve(down) as other:
        teacher = VLLMServerTeacher(Connection([url, other], max_in_flight=2, patience=10.0))
        teacher.setup(student, torch.nn.Module(), CPU)
        down.failures = [0] * 1000
        alive.max_in_flight, alive.delay = 0, 0.05
        assert len(list(teacher.score_all(make_batches(), ScoreRequest()))) == 2
        assert alive.max_in_flight == 2
        teacher.close()


def test_patience_begins_with_the_first_failure(student, fake):
    with serve(fake) as url:
        teacher = VLLMServerTeacher(Connection([url], timeout=0.4, patience=0.3))
        teacher.setup(student, torch.nn.Module(), CPU)
        fake.delay = 0.6  # the time-out passes after longer than the patience: that is the first failure, not the last
        threading.Timer(0.3, lambda: setattr(fake, "delay", 0.0)).start()
        assert len(list(teacher.score_all(make_batches()[:1], ScoreRequest()))) == 1
        teacher.close()


def test_after_closing_nothing_is_asked_any_more(student, fake):
    with serve(fake) as url:
        teacher = set_up(student, url)
        teacher.close()
        fake.requests.clear()
        teacher.prefetch(make_rollouts()[0], ScoreRequest(), 0)  # a generation was still under way
        assert fake.requests == [] and not teacher._early


def test_closing_hangs_up_on_an_answer_that_does_not_come(student, fake):
    with serve(fake) as url:
        teacher = set_up(student, url)
        fake.gate = threading.Event()
        teacher.prefetch(make_rollouts()[0], ScoreRequest(), 0)
        (future,) = teacher._early[0].values()
        assert fake.has_begun.wait(100)
        teacher.close()
        with pytest.raises(ServerUnreachable):
            future.result(50)  # the server has not answered yet


def test_a_score_that_failed_early_is_asked_for_again(student, fake):
    with serve(fake) as url:
        teacher = VLLMServerTeacher(Connection([url], patience=0.1))
        teacher.setup(student, torch.nn.Module(), CPU)
        fake.failures = [0] * 1000
        teacher.prefetch(make_rollouts()[0], ScoreRequest(), 0)
        wait(teacher._early[0].values())
        fake.failures = []
        assert len(list(teacher.score_all(make_batches(), ScoreRequest()))) == 2
        teacher.close()


def test_servers_share_the_work(student, teacher_folder):
    fakes = [FakeVLLM(teacher_folder), FakeVLLM(teacher_folder)]
    with serve(fakes[0]) as first, serve(fakes[1]) as second:
        teacher = set_up(student, first, second)
        all_asked = threading.Barrier(5)
        for fake in fakes:
            fake.requests.clear()
            fake.gate = all_asked
        list(teacher.score_all(make_batches(), ScoreRequest()))
        assert sorted(len(fake.requests) for fake in fakes) == [2, 3]
        teacher.close()


@pytest.mark.parametrize("failure", [0, 500, 503, 429])
def test_a_stumble_is_forgiven(student, fake, failure):
    with serve(fake) as url:
        teacher = set_up(student, url)
        fake.failures = [failure, failure]
        assert [scores.num_tokens for scores in teacher.score_all(make_batches(), ScoreRequest())] == [17, 18]
        assert fake.failures == []
        teacher.close()


def test_while_one_server_answers_a_dead_one_is_passed_over(student, teacher_folder):
    fakes = [FakeVLLM(teacher_folder), FakeVLLM(teacher_folder)]
    with serve(fakes[1]) as second:
        with serve(fakes[0]) as first:
            teacher = set_up(student, first, second)
        assert [scores.num_tokens for scores in teacher.score_all(make_batches(), ScoreRequest())] == [17, 18]
        teacher.close()


def test_a_server_that_comes_back_is_used_again(student, fake):
    with serve(fake) as url:
        teacher = set_up(student, url)
    pending = teacher.score_all(make_batches(), ScoreRequest())
    with serve(fake, port=int(url.rpartition(":")[2])):
        assert [scores.num_tokens for scores in pending] == [17, 18]
    teacher.close()


def test_a_server_that_stays_dead_is_named_in_one_line(student, fake):
    with serve(fake) as url:
        teacher = VLLMServerTeacher(patient(url, patience=0.5))
        teacher.setup(student, torch.nn.Module(), CPU)
    with pytest.raises(
        ServerUnreachable, match=rf"teacher: no answer for 0\.5 s from {url} .*resume from the last checkpoint"
    ):
        list(teacher.score_all(make_batches(), ScoreRequest()))
    teacher.close()


def test_a_server_that_was_never_there_is_named(student):
    with pytest.raises(ServerUnreachable, match=r"teacher: no answer for 0\.2 s from http://127\.0\.0\.1:9 "):
        VLLMServerTeacher(patient("http://127.0.0.1:9", patience=0.2)).preflight(student)


def test_a_server_that_hangs_is_given_up(student, fake):
    with serve(fake) as url:
        teacher = VLLMServerTeacher(patient(url, timeout=0.2, patience=0.3))
        teacher.setup(student, torch.nn.Module(), CPU)
        fake.gate = threading.Event()
        with pytest.raises(ServerUnreachable, match=r"no whole answer within 0\.2 s"):
            list(teacher.score_all(make_batches(), ScoreRequest()))
        teacher.close()


def test_the_key_is_sent_and_not_shown(student, fake):
    with serve(fake) as url:
        connection = patient(url, api_key="very-secret")
        VLLMServerTeacher(connection).preflight(student)
    assert set(fake.authorizations) == {"Bearer very-secret"} and "very-secret" not in repr(connection)


# ------------------------------------------------------------------------------------------------- fake against real


def shape(value):
    """Types and keys of an answer; keys that are token ids or texts count as any."""
    if isinstance(value, dict):
        if all(isinstance(entry, dict) and "logprob" in entry for entry in value.values()):
            return ("scores", shape(next(iter(value.values()))))
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(entry) for entry in value]
    return type(value).__name__


def included(small, large):
    """Whether everything the fake says is said by the real one too, in the same form."""
    if isinstance(small, dict):
        return isinstance(large, dict) and all(key in large and included(small[key], large[key]) for key in small)
    if isinstance(small, list):
        return isinstance(large, list) and all(map(included, small, large))
    return small == large


@pytest.mark.parametrize("name", [*recorded_answers()])
def test_the_fake_answers_in_the_shape_of_the_real_one(fake, name):
    recorded = recorded_answers()[name]
    body = recorded["body"]
    try:
        status, answer = 200, fake.answer("GET" if body is None else "POST", recorded["path"], body)
    except Refusal as refusal:
        status, answer = refusal.status, refusal.body
    assert status == recorded["status"]
    answer.get("data", [{}])[0].pop("permission", None)
    if status == 200 and name == "rollout":  # random texts
        for choice in (answer["choices"][0], recorded["answer"]["choices"][0]):
            choice["logprobs"].pop("top_logprobs")
            choice.pop("stop_reason")
            for values in (*choice["logprobs"].values(), choice["token_ids"]):
                del values[1:]
    assert included(shape(answer), shape(recorded["answer"])), (answer, recorded["answer"])


@pytest.mark.parametrize(("name", "k"), [("sampled token", 0), ("top 3", 3)])
def test_recorded_scores_are_read(name, k):
    recorded = recorded_answers()[name]
    entries, prompt = recorded["answer"]["choices"][0]["prompt_logprobs"], recorded["body"]["prompt"]
    sampled, ids, log_probs = read_scores(entries, prompt, [1, 2, 3], k)
    assert sampled.tolist() == pytest.approx([entries[i][str(prompt[i])]["logprob"] for i in (1, 2, 3)])
    assert ids.shape == log_probs.shape == (3, k)
    for entry, row in zip(entries[1:], ids.tolist(), strict=True):
        ranks = {int(token_id): score["rank"] for token_id, score in entry.items()}
        assert [ranks[token_id] for token_id in row] == list(range(1, k + 1))
