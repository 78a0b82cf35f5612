"""`VLLMColocatedEngine` against the Hugging Face engine on the same weights, on a real vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from make_tiny_models import make_folder, make_prompts, perturb, student_log_probs

from opd_lightning.backends.hf import HFEngine, HFStudent, LoraSettings
from opd_lightning.backends.vllm_colocated import VLLMColocatedEngine
from opd_lightning.interfaces import Sampling

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
WARM = Sampling(max_new_tokens=24, temperature=0.7)
ENGINE_ARGS = {"block_size": 32, "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
KINDS = {
    "untied": (False, None),
    "tied": (True, None),
    "lora": (False, ["q_proj", "down_proj"]),
    "lora on a tied model": (True, "all-linear"),
}


class Pair:
    """The same live student behind both engines."""

    def __init__(self, folder, lora_targets=None, **options):
        lora = None if lora_targets is None else LoraSettings(r=4, target_modules=lora_targets)
        self.student = HFStudent(str(folder), lora=lora)
        self.model = self.student.load()
        self.version = 0
        self.hf, self.vllm = HFEngine(), VLLMColocatedEngine(ENGINE_ARGS, **options)
        for engine in (self.hf, self.vllm):
            engine.setup(self.student, CPU)
        self.sync()

    def sync(self):
        for engine in (self.hf, self.vllm):
            engine.sync(self.model, self.version)

    def step(self):
        self.version += 1
        perturb(self.model, seed=self.version)
        self.sync()

    @property
    def prompts(self):
        return make_prompts(self.student)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    tied, lora_targets = KINDS[request.param]
    pair = Pair(make_folder(tmp_path_factory.mktemp("student"), tied=tied), lora_targets)
    yield pair
    pair.vllm.close()


def tokens(rollouts):
    return [rollout.response_ids.tolist() for rollout in rollouts]


def assert_greedy_is_the_same(pair):
    expected, actual = pair.hf.generate(pair.prompts, GREEDY), pair.vllm.generate(pair.prompts, GREEDY)
    assert tokens(actual) == tokens(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-4)
        assert (a.finished, a.text, a.seed, a.problem) == (b.finished, b.text, b.seed, b.problem)
    return tokens(actual)


def test_greedy_equals_hugging_face_before_and_after_syncs(pair):
    outputs = [assert_greedy_is_the_same(pair)]
    for _ in range(3):
        pair.step()
        outputs.append(assert_greedy_is_the_same(pair))
        assert_greedy_is_the_same(pair)  # this time from the prefix cache
    assert len({str(output) for output in outputs}) == 4  # the steps were not too small to see


def test_weights_that_moved_without_an_optimiser_step_are_seen(pair):
    """EffOPD: a candidate, then back."""
    before = {name: parameter.detach().clone() for name, parameter in pair.model.named_parameters()}
    base = assert_greedy_is_the_same(pair)
    pair.step()
    assert assert_greedy_is_the_same(pair) != base
    with torch.no_grad():
        for name, parameter in pair.model.named_parameters():
            parameter.copy_(before[name])
    pair.version += 1
    pair.sync()
    assert assert_greedy_is_the_same(pair) == base


def test_sampled_log_probs_are_the_students_and_padding_rows_are_never_drawn(pair):
    rollouts = pair.vllm.generate(make_prompts(pair.student, num_seeds=8), WARM)
    own = student_log_probs(pair.student, pair.model, rollouts, WARM.temperature)
    torch.testing.assert_close(torch.cat([r.log_probs for r in rollouts]), own, rtol=0, atol=1e-4)
    assert max(int(rollout.response_ids.max()) for rollout in rollouts) < pair.student.tokenizer.vocab_size


@pytest.fixture(scope="module")
def tied_pair(tmp_path_factory):
    pair = Pair(make_folder(tmp_path_factory.mktemp("student"), tied=True))
    yield pair
    pair.vllm.close()


def test_a_rollout_is_a_function_of_its_seed(tied_pair):
    prompts = make_prompts(tied_pair.student, num_seeds=3)
    first, again = tied_pair.vllm.generate(prompts, WARM), tied_pair.vllm.generate(prompts, WARM)
    assert tokens(first) == tokens(again)
    backwards = tied_pair.vllm.generate(prompts[::-1], WARM)
    by_seed = {rollout.seed: rollout.response_ids.tolist() for rollout in backwards}
    assert all(by_seed[rollout.seed] == rollout.response_ids.tolist() for rollout in first)
    assert len({str(rollout.response_ids.tolist()) for rollout in first}) == len(first)


def test_any_stop_id_closes_a_response_and_is_part_of_it(tied_pair):
    free = tied_pair.vllm.generate(tied_pair.prompts, WARM)[0].response_ids.tolist()
    stop = free[5]
    sampling = Sampling(max_new_tokens=24, temperature=0.7, stop_ids=[stop])
    rollout = tied_pair.vllm.generate(tied_pair.prompts, sampling)[0]
    assert rollout.response_ids.tolist() == free[: free.index(stop) + 1]
    assert rollout.finished and len(rollout.log_probs) == len(rollout.response_ids)


def test_a_version_that_vllm_has_is_not_sent_again(tied_pair, monkeypatch):
    sent = []
    monkeypatch.setattr(tied_pair.vllm, "_transfer", lambda model, version: sent.append(version))
    tied_pair.vllm.sync(tied_pair.model, tied_pair.version)
    assert sent == []
    tied_pair.vllm.sync(tied_pair.model, tied_pair.version + 1)
    assert sent == [tied_pair.version + 1]
    tied_pair.vllm.weight_version = tied_pair.version


def test_the_cache_of_old_weights_would_show(tied_pair, monkeypatch):
    """Without the reset the first test would fail: these prompts do hit the prefix cache."""
    tied_pair.vllm.generate(tied_pair.prompts, GREEDY)
    monkeypatch.setattr(tied_pair.vllm._llm, "reset_prefix_cache", lambda: True)
    tied_pair.step()
    with pytest.raises(AssertionError):
        assert_greedy_is_the_same(tied_pair)
    monkeypatch.undo()
    tied_pair.step()
    assert_greedy_is_the_same(tied_pair)


def test_the_surroundings_stay_as_they_are(tied_pair):
    torch.manual_seed(3)
    state, threads, setter = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    affinity = os.sched_getaffinity(0)
    training = [module.training for module in tied_pair.model.modules()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tied_pair.step()
        inside = tokens(tied_pair.vllm.generate(tied_pair.prompts, GREEDY))
    assert inside == assert_greedy_is_the_same(tied_pair)  # vLLM computes in its own precision
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads and torch.set_num_threads is setter
    assert os.sched_getaffinity(0) == affinity
    assert [module.training for module in tied_pair.model.modules()] == training
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_behind_a_cut_log_probs_are_nan_and_said_so(tied_pair):
    with pytest.warns(UserWarning, match="does not tell the log-probabilities before such a cut"):
        rollouts = tied_pair.vllm.generate(tied_pair.prompts, Sampling(max_new_tokens=4, top_k=2))
    assert all(rollout.log_probs.isnan().all() for rollout in rollouts)


def test_a_prompt_without_room_is_refused(tied_pair):
    with pytest.raises(
        ValueError, match=r"do not fit into vLLM's 256 tokens\. Raise engine\.engine_args\.max_model_len"
    ):
        tied_pair.vllm.generate(tied_pair.prompts, Sampling(max_new_tokens=250))


def test_an_engine_can_be_closed_and_used_again(tied_pair):
    tied_pair.vllm.close()
    assert not torch.distributed.is_initialized()
    tied_pair.sync()
    assert_greedy_is_the_same(tied_pair)


def test_weights_that_went_astray_are_noticed(tmp_path, monkeypatch):
    from opd_lightning.backends import vllm_colocated

    honest = vllm_colocated.folder_weights

    def without_a_layer(*arguments):
        return (pair for pair in honest(*arguments) if "layers.1.mlp" not in pair[0])

    monkeypatch.setattr(vllm_colocated, "folder_weights", without_a_layer)
    with pytest.raises(ValueError, match=r"engine: vLLM and the student disagree about the same tokens"):
        Pair(make_folder(tmp_path))


def test_an_unknown_engine_argument_is_named(tmp_path):
    student = HFStudent(str(make_folder(tmp_path)))
    engine = VLLMColocatedEngine({"gpu_memory": 0.5})
    engine.setup(student, CPU)
    with pytest.raises(ValueError, match=r"engine\.engine_args: .*gpu_memory"):
        engine.sync(student.load(), 0)
    engine.close()


def test_in_a_process_of_its_own_it_is_the_same(tmp_path):
    shared = set(Path("/dev/shm").iterdir())
    pair = Pair(make_folder(tmp_path, tied=True), own_process=True)
    try:
        assert_greedy_is_the_same(pair)
        pair.step()
        assert_greedy_is_the_same(pair)
        assert not [path for path in set(Path("/dev/shm").iterdir()) - shared if "opd_lightning" in path.name]
    finally:
        pair.vllm.close()


def test_two_training_processes_have_an_engine_each(tmp_path):
    folder = make_folder(tmp_path / "student", tied=True)
    here = Path(__file__).parent
    command = [sys.executable, str(here / "two_ranks.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(here.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("greedy is the same") == 2
