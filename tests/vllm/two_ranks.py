"""Run by test_vllm_colocated_engine.py: two ranks, each with an engine of its own beside a gloo process group."""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def main(rank, folder, store):
    from make_tiny_models import make_prompts, perturb

    from opd_lightning.backends.hf import HFEngine, HFStudent
    from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
    from opd_lightning.interfaces import Sampling

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student = HFStudent(folder)
    model = student.load()
    device = torch.device("cpu")
    engines = HFEngine(), VLLMColocatedEngine({"enforce_eager": True, "kv_cache_memory_bytes": 2**28})
    prompts = make_prompts(student)[rank::2]
    for version in (0, 1):
        answers = []
        for engine in engines:
            engine.setup(student, device)
            engine.sync(model, version)
            answers.append(engine.generate(prompts, Sampling(max_new_tokens=16, temperature=0.0)))
        assert [r.response_ids.tolist() for r in answers[0]] == [r.response_ids.tolist() for r in answers[1]]
        perturb(model, seed=7)
    engines[1].close()
    total = torch.ones(1)
    dist.all_reduce(total)  # the training's process group has survived
    assert total == 2
    print("greedy is the same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, args=(sys.argv[1], sys.argv[1] + "/store"), nprocs=2)
