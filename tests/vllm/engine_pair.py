"""One live student behind both engines, and whether they say the same."""

import torch
from make_tiny_models import make_prompts, perturb

from opd_lightning.backends.hf import HFEngine, HFStudent, LoraSettings
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.interfaces import Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
ENGINE_ARGS = {"block_size": 32, "enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_batched_tokens": 256}


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


def tokens(rollouts):
    return [rollout.response_ids.tolist() for rollout in rollouts]


def assert_greedy_is_the_same(pair):
    expected, actual = pair.hf.generate(pair.prompts, GREEDY), pair.vllm.generate(pair.prompts, GREEDY)
    assert tokens(actual) == tokens(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-4)
        assert (a.finished, a.text, a.seed, a.problem) == (b.finished, b.text, b.seed, b.problem)
    return tokens(actual)
