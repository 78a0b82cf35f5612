"""What the vLLM engines are asked, what they refuse, and what becomes of answers; no vLLM needed."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from opd_lightning.backends.hf import HFStudent
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.backends.vllm.placement import (
    engine_defaults,
    environment,
    launcher_variables,
    process_group_kept,
    visible_devices,
)
from opd_lightning.backends.vllm.probe import check_same_model
from opd_lightning.backends.vllm.requests import (
    CalledOff,
    check_prompts,
    make_rollout,
    run_to_the_end,
    sampling_fields,
)
from opd_lightning.interfaces import Problem, Prompt, Sampling
from opd_lightning.rollouts.answering import resolve_stop_ids

PROBLEM = Problem(uid="letters/1", messages=({"role": "user", "content": "say a"},), answer="a")


@pytest.fixture(scope="module")
def student(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder))


@pytest.mark.parametrize("name", ["load_format", "logprobs_mode", "enable_sleep_mode", "weight_transfer_config"])
def test_an_argument_that_the_engine_decides_is_refused(name):
    with pytest.raises(ValueError, match=rf"engine\.engine_args: {name} is decided by the engine"):
        VLLMColocatedEngine({name: "x", "max_model_len": 8})


def test_gpus_must_be_as_many_as_shards():
    with pytest.raises(ValueError, match=r"engine\.devices: expected 2 GPUs .* got \[1\]"):
        VLLMColocatedEngine({"tensor_parallel_size": 2}, devices=[1])


def test_a_tolerance_must_be_positive():
    with pytest.raises(ValueError, match=r"engine\.max_mean_mismatch: expected a positive number, got 0"):
        VLLMColocatedEngine(max_mean_mismatch=0)


def test_several_shards_or_named_gpus_mean_a_process_of_its_own():
    assert not VLLMColocatedEngine().own_process
    assert VLLMColocatedEngine({"tensor_parallel_size": 2}).own_process
    assert VLLMColocatedEngine(devices=[1]).own_process


def test_without_vllm_the_message_says_what_to_install(student, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ValueError, match=r"needs vLLM .*opd-lightning\[vllm\].*HFEngine"):
        VLLMColocatedEngine().setup(student, torch.device("cpu"))


def test_the_context_is_the_students_unless_said_otherwise(student, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", type(os)("vllm"))
    for arguments, expected in (({}, student.context_length), ({"max_model_len": 40}, 40)):
        engine = VLLMColocatedEngine(arguments)
        engine.setup(student, torch.device("cpu"))
        assert engine.max_model_len == expected


def test_stop_ids_are_the_samplings_or_the_students(student):
    tokenizer = student.tokenizer
    assert resolve_stop_ids(tokenizer, Sampling()) == list(tokenizer.stop_ids)
    assert resolve_stop_ids(tokenizer, Sampling(stop_ids=[5])) == [5]
    assert resolve_stop_ids(tokenizer, Sampling(stop_ids=[])) == []
    with pytest.raises(ValueError, match=r"sampling\.stop_ids: expected token ids from 0 to \d+, got \[100000\]"):
        resolve_stop_ids(tokenizer, Sampling(stop_ids=[5, 100000]))


def test_without_stop_ids_only_the_length_ends_a_response(student):
    sampling = Sampling(max_new_tokens=2, stop_ids=[])
    rollout = make_rollout(student, Prompt(PROBLEM, (9,), (0,)), 0, [20, 3], [-1.0, -0.5], sampling, [])
    assert not rollout.finished and rollout.text == student.tokenizer.decode([20, 3], skip_special_tokens=False)


def test_prompts_must_leave_room_for_a_whole_response():
    check_prompts([Prompt(PROBLEM, (1,) * 6, (0,))], Sampling(max_new_tokens=4), 10, "max_model_len")
    with pytest.raises(
        ValueError, match=r"'letters/1': 7 prompt tokens .* do not fit into vLLM's 10 tokens. Raise max_mo"
    ):
        check_prompts([Prompt(PROBLEM, (1,) * 7, (0,))], Sampling(max_new_tokens=4), 10, "max_model_len")
    with pytest.raises(ValueError, match="'letters/1': the prompt is empty"):
        check_prompts([Prompt(PROBLEM, (), (0,))], Sampling(max_new_tokens=4), 10, "max_model_len")


def test_every_field_that_changes_the_distribution_is_said():
    fields = sampling_fields(Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3), 11, [2, 3])
    assert fields["ignore_eos"] and fields["stop_token_ids"] == [2, 3]
    assert (fields["seed"], fields["max_tokens"]) == (11, 7)
    assert (fields["temperature"], fields["top_p"], fields["top_k"], fields["min_p"]) == (0.5, 0.9, 3, 0.0)
    assert {fields[f"{name}_penalty"] for name in ("presence", "frequency")} == {0.0}
    assert fields["repetition_penalty"] == 1.0


def test_a_temperature_that_vllm_would_raise_silently_is_refused():
    assert sampling_fields(Sampling(temperature=0.0), 0, [1])["temperature"] == 0
    with pytest.raises(ValueError, match=r"sampling\.temperature: vLLM takes 0 \(greedy\) or at least 0.01, got 0.001"):
        sampling_fields(Sampling(temperature=0.001), 0, [1])


def test_an_answer_becomes_a_rollout(student):
    prompt = Prompt(PROBLEM, (9, 10), (5,))
    rollout = make_rollout(student, prompt, 5, [20, 21, 3], [-1.0, -2.0, -0.5], Sampling(), [3])
    assert rollout.response_ids.tolist() == [20, 21, 3] and rollout.prompt_ids.tolist() == [9, 10]
    assert rollout.response_ids.dtype == rollout.prompt_ids.dtype == torch.int64
    assert rollout.log_probs.dtype == torch.float32 and rollout.log_probs.tolist() == [-1.0, -2.0, -0.5]
    assert rollout.finished and rollout.seed == 5
    assert rollout.text == student.tokenizer.decode([20, 21])
    full = Sampling(max_new_tokens=2)
    assert not make_rollout(student, prompt, 5, [20, 21], [-1.0, -2.0], full, [3]).finished


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_an_answer_that_was_called_off_is_no_rollout(student, num_tokens):
    token_ids, log_probs = [20] * num_tokens, [-1.0] * num_tokens
    with pytest.raises(CalledOff, match=f"engine: vLLM stopped after {num_tokens} of 3 tokens of a response"):
        make_rollout(student, Prompt(PROBLEM, (9,), (0,)), 0, token_ids, log_probs, Sampling(max_new_tokens=3), [3])


class Stepper:
    """vLLM's engine, as far as a loop sees it: one answer a step; the second is broken."""

    def __init__(self):
        self.waiting, self.aborted = ["0", "1", "2"], []

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        name = self.waiting.pop(0)
        return [SimpleNamespace(request_id=name, outputs=[name])]

    def abort_request(self, names):
        self.aborted = names
        self.waiting = [name for name in self.waiting if name not in names]


def test_what_an_error_leaves_unanswered_is_called_off():
    engine, answers = Stepper(), {}
    run_to_the_end(engine, 3, answers.__setitem__, threading.Event())
    assert answers == {0: "0", 1: "1", 2: "2"} and not engine.aborted

    def read(i, answer):
        if i == 1:
            raise FloatingPointError("not finite")

    engine = Stepper()
    with pytest.raises(FloatingPointError):
        run_to_the_end(engine, 3, read, threading.Event())
    assert engine.aborted == ["1", "2"] and not engine.has_unfinished_requests()


def test_an_interrupt_calls_the_rest_off():
    engine, interrupted, answers = Stepper(), threading.Event(), []

    def read(i, answer):
        answers.append(answer)
        interrupted.set()

    with pytest.raises(CalledOff, match="the run was stopped while 2 responses were under way"):
        run_to_the_end(engine, 3, read, interrupted)
    assert answers == ["0"] and engine.aborted == ["1", "2"]


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(top_k=5)])
def test_log_probs_behind_a_cut_are_not_made_up(student, sampling):
    rollout = make_rollout(student, Prompt(PROBLEM, (9,), (0,)), 0, [20, 3], [-1.0, -0.1], sampling, [3])
    assert rollout.log_probs.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_broken_logits_stop_the_run(student, value):
    with pytest.raises(FloatingPointError, match="not finite for problem 'letters/1'"):
        make_rollout(student, Prompt(PROBLEM, (9,), (0,)), 0, [20], [value], Sampling(max_new_tokens=1), [3])


def test_the_first_weights_are_checked_against_the_student(student):
    model = student.load()
    truth = []

    def honest(token_ids):
        with torch.no_grad():
            log_probs = model(torch.tensor([token_ids])).logits[0, :-1, : student.tokenizer.vocab_size].log_softmax(-1)
        truth[:] = log_probs.gather(-1, torch.tensor(token_ids[1:])[:, None]).squeeze(-1).tolist()
        return truth

    assert check_same_model(student, model, honest, 0.01, 100, "engine") < 1e-5
    assert len(truth) > 20 and model.training
    check_same_model(student, model, honest, 0.01, 10, "engine")
    assert len(truth) == 8  # a prompt and one new token fit
    with pytest.raises(ValueError, match=r"engine: vLLM and the student disagree .* by 0\.5 nats .*max_mean_mismatch"):
        check_same_model(student, model, lambda ids: [value + 0.5 for value in honest(ids)], 0.3, 100, "engine")
    with pytest.raises(ValueError, match="disagree"):
        check_same_model(student, model, lambda ids: [float("nan") for _ in honest(ids)], 0.3, 100, "engine")


def test_a_probe_of_one_token_is_still_compared(student, monkeypatch):
    asked = []

    def score(token_ids):
        asked.append(token_ids)
        return [0.0] * (len(token_ids) - 1)

    monkeypatch.setattr(type(student.tokenizer), "render", lambda self, messages: [9])
    with pytest.raises(ValueError, match="disagree"):
        check_same_model(student, student.load(), score, 0.01, 100, "engine")
    assert asked == [[9, 9]]


def test_engines_on_several_processes_do_not_share_named_gpus(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"engine\.devices: each of 2 training processes .*Leave it out"):
        visible_devices(torch.device("cuda", 0), [1], 1)


def test_what_the_cpu_build_needs_is_set_there_only():
    assert engine_defaults(torch.device("cpu"), 64)["enable_chunked_prefill"] is False
    assert "enable_chunked_prefill" not in engine_defaults(torch.device("cuda"), 64)


def test_environment_variables_are_taken_back(monkeypatch):
    monkeypatch.setenv("OPD_PRESENT", "before")
    monkeypatch.delenv("OPD_ABSENT", raising=False)
    with environment({"OPD_PRESENT": "now", "OPD_ABSENT": "now"}):
        assert os.environ["OPD_PRESENT"] == os.environ["OPD_ABSENT"] == "now"
    assert os.environ["OPD_PRESENT"] == "before" and "OPD_ABSENT" not in os.environ


def test_a_process_on_another_than_the_first_gpu_says_so():
    assert launcher_variables(torch.device("cpu")) == ({}, {})
    assert launcher_variables(torch.device("cuda", 0)) == ({}, {})
    arguments, variables = launcher_variables(torch.device("cuda", 3))
    assert arguments == {"distributed_executor_backend": "external_launcher"}
    assert (variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"]) == ("0", "3", "1")
    assert int(variables["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("shown", "device", "devices", "num_shards", "expected"),
    [
        (None, torch.device("cpu"), None, 1, {}),
        (None, torch.device("cuda", 2), None, 1, {"CUDA_VISIBLE_DEVICES": "2"}),
        (None, torch.device("cuda", 0), [1], 1, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("4,5,7", torch.device("cuda", 0), [1, 2], 2, {"CUDA_VISIBLE_DEVICES": "5,7"}),
        (None, torch.device("cuda", 0), None, 2, {}),
    ],
)
def test_a_child_sees_its_gpus_only(monkeypatch, shown, device, devices, num_shards, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_devices(device, devices, num_shards) == expected


def test_a_process_group_of_the_training_outlives_an_engine(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    destroy = dist.destroy_process_group
    with process_group_kept(True):
        dist.destroy_process_group(dist.new_group([0]))
        dist.destroy_process_group()
    assert dist.is_initialized() and dist.destroy_process_group is destroy
    with process_group_kept(False):
        dist.destroy_process_group()
    assert not dist.is_initialized()
