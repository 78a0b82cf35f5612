"""What `VLLMColocatedEngine` promises besides the right tokens: seeds, stops, caches, leaving things alone."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm")
from engine_pair import CPU, GREEDY, Pair, assert_greedy_is_the_same, tokens
from make_tiny_models import make_folder, make_prompts

from opd_lightning.backends.hf import HFStudent
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.interfaces import Sampling

pytestmark = pytest.mark.vllm

WARM = Sampling(max_new_tokens=24, temperature=0.7)


@pytest.fixture(scope="module")
def tied_pair(tmp_path_factory):
    pair = Pair(make_folder(tmp_path_factory.mktemp("student"), tied=True))
    yield pair
    pair.vllm.close()


def test_a_rollout_is_a_function_of_its_seed(tied_pair):
    prompts = make_prompts(tied_pair.student, num_seeds=3)
    first, again = tied_pair.vllm.generate(prompts, WARM), tied_pair.vllm.generate(prompts, WARM)
    assert tokens(first) == tokens(again)
    told = []
    backwards = tied_pair.vllm.generate(prompts[::-1], WARM, told.append)
    assert sorted(map(id, told)) == sorted(map(id, backwards))  # the same objects, as they were finished
    by_seed = {rollout.seed: rollout.response_ids.tolist() for rollout in backwards}
    assert all(by_seed[rollout.seed] == rollout.response_ids.tolist() for rollout in first)
    assert len({str(rollout.response_ids.tolist()) for rollout in first}) == len(first)


def test_threads_that_generate_at_once_take_turns(tied_pair):
    alone = tokens(tied_pair.vllm.generate(tied_pair.prompts, WARM))
    with ThreadPoolExecutor(3) as threads:
        at_once = list(threads.map(lambda _: tied_pair.vllm.generate(tied_pair.prompts, WARM), range(6)))
    assert all(tokens(rollouts) == alone for rollouts in at_once)


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


def test_an_update_past_vllms_reload_is_the_same_to_the_last_bit(tied_pair):
    tied_pair.step()
    (transfer,) = tied_pair.vllm._llm.collective_rpc(lambda worker: worker.weight_transfer_engine)
    layers = transfer._layers
    assert layers is not None  # as the first update has shown
    past = tied_pair.vllm.generate(tied_pair.prompts, GREEDY)
    transfer._layers = None
    tied_pair.version += 1
    tied_pair.sync()
    through = tied_pair.vllm.generate(tied_pair.prompts, GREEDY)
    transfer._layers = layers
    assert tokens(past) == tokens(through)
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(past, through, strict=True))


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


def test_an_engine_can_be_closed_and_is_checked_when_used_again(tied_pair, monkeypatch):
    from opd_lightning.backends.vllm import colocated as vllm_colocated

    checks = []
    monkeypatch.setattr(vllm_colocated, "check_same_model", lambda *arguments: checks.append(arguments))
    tied_pair.vllm.close()
    assert not torch.distributed.is_initialized()
    tied_pair.sync()
    assert len(checks) == 1
    assert_greedy_is_the_same(tied_pair)


def test_weights_that_went_astray_are_noticed(tmp_path, monkeypatch):
    honest = HFStudent.named_weights

    def without_a_layer(*arguments):
        return (pair for pair in honest(*arguments) if "layers.1.mlp" not in pair[0])

    monkeypatch.setattr(HFStudent, "named_weights", without_a_layer)
    with pytest.raises(ValueError, match=r"engine: vLLM and the student disagree about the same tokens"):
        Pair(make_folder(tmp_path))


def test_an_unknown_engine_argument_is_named(tmp_path):
    student = HFStudent(str(make_folder(tmp_path)))
    engine = VLLMColocatedEngine({"gpu_memory": 0.5})
    engine.setup(student, CPU)
    with pytest.raises(ValueError, match=r"engine\.engine_args: .*gpu_memory"):
        engine.sync(student.load(), 0)
    engine.close()
