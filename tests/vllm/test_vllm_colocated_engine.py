"""`VLLMColocatedEngine` against the Hugging Face engine on the same weights, on a real vLLM."""

import pytest
import torch

pytest.importorskip("vllm")
from engine_pair import Pair, assert_greedy_is_the_same
from make_tiny_models import make_folder, make_prompts, student_log_probs

from opd_lightning.interfaces import Sampling

pytestmark = pytest.mark.vllm

WARM = Sampling(max_new_tokens=24, temperature=0.7)
KINDS = {
    "untied": (False, None),
    "tied": (True, None),
    "lora": (False, ["q_proj", "down_proj"]),
    "lora on a tied model": (True, "all-linear"),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    tied, lora_targets = KINDS[request.param]
    pair = Pair(make_folder(tmp_path_factory.mktemp("student"), tied=tied), lora_targets)
    yield pair
    pair.vllm.close()


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
