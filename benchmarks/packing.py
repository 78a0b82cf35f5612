"""Ragged rollouts padded, and laid end to end: processor time of forward and backward, and how much is padding.

A random Qwen3 body of 2 layers, 256 wide, as student; one micro-batch per pass; the ways take turns, so that each ratio
is of neighbours in time. "One mask" is what transformers does by itself when positions start again within a row: one
mask over the whole row. Also the share of padding that sorting and cutting leave, and how unequal the tokens of
processes are, both for log-normal lengths.

    OMP_NUM_THREADS=1 python benchmarks/packing.py   # writes benchmarks/results/packing_cpu-2core.json
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from opd_lightning.backends.hf.anatomy import body_states
from opd_lightning.backends.hf.packing import allow_packing, response_states
from opd_lightning.interfaces import MicroBatch, Problem, Rollout
from opd_lightning.rollouts.batching import collate, cut_by_tokens, sequence_length

RESULTS = Path(__file__).parent / "results" / "packing_cpu-2core.json"
NUM_TURNS = 3
# prompts, rollouts of each, prompt tokens, median response, spread of its logarithm, most
WORKLOADS = {
    "32 of equal length": (32, 1, 8, 64, 0.0, 72),
    "32 like the quickstart's": (8, 4, 22, 62, 0.1, 72),
    "16, log-normal 0.5": (16, 1, 16, 160, 0.5, 512),
    "6, log-normal 0.8": (6, 1, 16, 300, 0.8, 1024),
    "4 prompts of 160, 4 of each": (4, 4, 160, 120, 0.4, 400),
}


def draw(num_prompts: int, n: int, num_prompt: int, median: int, spread: float, most: int) -> list[Rollout]:
    """Rollouts with log-normal response lengths, n of each prompt."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(num_prompts):
        prompt = torch.randint(90, (num_prompt,), generator=generator)
        problem = Problem(uid=str(i), messages=(), answer="")
        for j in range(n):
            length = int((median * torch.exp(spread * torch.randn(1, generator=generator))).round().clamp(4, most))
            response = torch.randint(90, (length,), generator=generator)
            rollouts.append(Rollout(problem, prompt, response, torch.zeros(length), finished=True, seed=i * n + j))
    return rollouts


def one_mask(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Hidden states by transformers' own detection of rows that hold several sequences."""
    is_real = batch.attention_mask.bool()
    states = body_states(model, batch.input_ids[is_real][None], None, batch.position_ids[is_real][None])[0]
    places = is_real.flatten().cumsum(0).view_as(batch.attention_mask) - 1
    return states[places[batch.rows, batch.columns]]


def seconds(model: nn.Module, run: Callable[[], Tensor]) -> float:
    """Processor seconds of forward and backward."""
    started = time.process_time()
    run().square().mean().backward()
    model.zero_grad()
    return time.process_time() - started


def measure_passes() -> dict[str, dict[str, list[float] | float]]:
    """Seconds of each way for each workload, turn by turn; the first turn warms up."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape, **heads)).train()
    packed = copy.deepcopy(plain)
    allow_packing(packed, True, "student")
    results: dict[str, dict[str, list[float] | float]] = {}
    for name, workload in WORKLOADS.items():
        batch = collate(draw(*workload), 0)
        ways: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
            "padded": (plain, lambda batch=batch: response_states(plain, batch, False)),
            "packed": (packed, lambda batch=batch: response_states(packed, batch, True)),
            "one mask": (plain, lambda batch=batch: one_mask(plain, batch)),
        }
        turns = [{way: seconds(*ways[way]) for way in ways} for _ in range(NUM_TURNS + 1)][1:]
        share = 1 - float(batch.attention_mask.sum()) / batch.attention_mask.numel()
        results[name] = {"padding share": round(share, 4)}
        results[name] |= {way: [round(turn[way], 3) for turn in turns] for way in ways}
        ratios = {way: statistics.median(turn["padded"] / turn[way] for turn in turns) for way in ways}
        print(f"{name}: padding {share:.1%}; " + ", ".join(f"{way} {r:.2f}x" for way, r in ratios.items()), flush=True)
    return results


def padding_of_cuts() -> dict[str, float]:
    """Share of padding after sorting and cutting, by number of rollouts and budget."""
    shares = {}
    for num_rollouts in (64, 512):
        rollouts = draw(num_rollouts, 1, 100, 400, 0.5, 2048)
        for budget in (4096, 16384):
            groups = cut_by_tokens(rollouts, budget)
            num_padded = sum(len(group) * max(map(sequence_length, group)) for group in groups)
            share = 1 - sum(map(sequence_length, rollouts)) / num_padded
            shares[f"{num_rollouts} rollouts, budget {budget}: {len(groups)} micro-batches"] = round(share, 4)
    return shares


def imbalance_of_processes() -> dict[str, float]:
    """Tokens of the fullest process over their mean, 64 rollouts each; mean over 200 draws."""
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for num_processes in (2, 8):
        lengths = 400 * torch.exp(0.5 * torch.randn(200, num_processes, 64, generator=generator))
        tokens = lengths.clamp(max=2048).sum(dim=2)
        ratios[f"{num_processes} processes"] = round(float((tokens.amax(1) / tokens.mean(1)).mean()), 4)
    return ratios


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {
        "machine": f"{platform.machine()}, 2 cores shared with other work, 1 thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "padding share of cuts": padding_of_cuts(),
        "tokens of the fullest process": imbalance_of_processes(),
        "processor seconds": measure_passes(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
