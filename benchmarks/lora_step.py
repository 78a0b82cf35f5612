"""What the two ways of moving LoRA pairs lose, and which of them trains better, on a small distillation problem.

A frozen random network with low-rank additions learns to imitate a network whose matrices differ by a full-rank
change. At every search, for every candidate: how far B A ends up from the exact step of the product, as a share of
the step (for "product" the truncation back to rank r, for "factors" the cross term). And the loss during training,
also with candidates that reach further, so that a longer step is not taken for a better direction.

    python benchmarks/lora_step.py   # three minutes on one core; benchmarks/results/lora_step_cpu-2core.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_lightning import EffOPDOptimizer
from opd_lightning.extrapolation import extrapolate_product

WIDTH, NUM_STEPS = 64, 128
STEPS = (8, 16, 32, 64, 128)  # losses are noted here
CANDIDATES = {"to 10": (2, 4, 6, 8, 10), "to 80": (2, 4, 6, 8, 10, 14, 20, 28, 40, 56, 80)}
RESULTS = Path(__file__).parent / "results"


class LowRank(nn.Module):
    """A frozen matrix with a trainable low-rank addition."""

    def __init__(self, matrix: Tensor, rank: int):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.lora_A = nn.Parameter(torch.randn(rank, WIDTH) / math.sqrt(WIDTH))
        self.lora_B = nn.Parameter(torch.zeros(WIDTH, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Apply matrix and addition."""
        return x @ self.matrix.T + x @ self.lora_A.T @ self.lora_B.T


def make_problem(seed: int, rank: int) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, three layers each."""
    torch.manual_seed(seed)
    matrices = [torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH) for _ in range(3)]
    decay = torch.arange(1, WIDTH + 1) ** -1.0  # a few strong directions and a long tail, as fine-tuning leaves them
    changes = [1.5 * torch.randn(WIDTH, WIDTH) @ torch.diag(decay) / math.sqrt(WIDTH) for _ in range(3)]
    layers, targets = [], []
    for matrix, change in zip(matrices, changes, strict=True):
        layers += [LowRank(matrix, rank), nn.Tanh()]
        target = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        target.weight.copy_(matrix + change)
        targets += [target, nn.Tanh()]
    return nn.Sequential(*layers[:-1]), nn.Sequential(*targets[:-1])


def loss_of(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """Reverse KL between the two networks' outputs read as logits, nats."""
    p, q = student(x).log_softmax(-1), teacher(x).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def deviations(student: nn.Module, older: dict[str, Tensor]) -> list[dict[str, float]]:
    """Distance from the exact product step, as a share of it, for each candidate; median over layers."""
    rows = []
    for factor in (2.0, 10.0):
        shares: dict[str, list[float]] = {"product": [], "factors": []}
        for name, layer in student.named_children():
            if not isinstance(layer, LowRank):
                continue
            a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
            a_0, b_0 = older[f"{name}.lora_A"].double(), older[f"{name}.lora_B"].double()
            step = factor * (b @ a - b_0 @ a_0)
            moved = {
                "product": extrapolate_product(a, b, a_0, b_0, factor),
                "factors": (a + factor * (a - a_0), b + factor * (b - b_0)),
            }
            for way, (new_a, new_b) in moved.items():
                shares[way].append(float((new_b @ new_a - b @ a - step).norm() / step.norm()))
        rows.append({"factor": factor} | {way: statistics.median(values) for way, values in shares.items()})
    return rows


def train(seed: int, rank: int, rate: float, lora: str, reach: str) -> dict:
    """One run; `lora` is a way of moving, or "none" for plain training."""
    student, teacher = make_problem(seed, rank)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.randn(512, WIDTH, generator=generator)
    weights = dict(student.named_parameters())
    inner = torch.optim.Adam(student.parameters(), lr=rate)
    optimizer: torch.optim.Optimizer = inner
    if lora != "none":
        scored = held_out[:128]
        optimizer = EffOPDOptimizer(
            inner,
            lambda: -float(loss_of(student, teacher, scored)),
            candidates=CANDIDATES[reach],
            lora=lora,
            module=student,
        )
    older = {name: weight.detach().clone() for name, weight in weights.items()}
    searches, losses = [], {}
    for step in range(1, NUM_STEPS + 1):
        optimizer.zero_grad()
        loss_of(student, teacher, torch.randn(64, WIDTH, generator=generator)).backward()
        if lora == "none" and step & (step - 1) == 0:
            inner.step()
            searches.append({"step": step, "deviations": deviations(student, older)})
            older = {name: weight.detach().clone() for name, weight in weights.items()}
        else:
            optimizer.step()
        if step in STEPS:
            with torch.no_grad():
                losses[step] = float(loss_of(student, teacher, held_out))
    setting = {"seed": seed, "rank": rank, "rate": rate, "lora": lora, "candidates": reach}
    return setting | {"searches": searches, "losses": losses}


def report(groups: dict[str, list[dict]], title: str) -> None:
    """Print the mean losses of each way, and how much lower "factors" is than "product", seed by seed."""
    for lora, runs in groups.items():
        means = ", ".join(f"{step}: {statistics.mean(run['losses'][step] for run in runs):.4f}" for step in STEPS)
        print(f"{title}, {lora:8} loss at step {means}")
    if "none" in groups:
        rows = [row for run in groups["none"] for search in run["searches"][1:] for row in search["deviations"]]
        for factor in (2.0, 10.0):
            shares = {w: statistics.median(r[w] for r in rows if r["factor"] == factor) for w in ("product", "factors")}
            off = ", ".join(f"{way} {100 * share:.2g} %" for way, share in shares.items())
            print(f"{title}, off the exact step at {factor:+g}: {off} of it")
    else:
        for step in STEPS:
            pairs = zip(groups["factors"], groups["product"], strict=True)
            gains = [1 - one["losses"][step] / other["losses"][step] for one, other in pairs]
            half_width = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
            mean = statistics.mean(gains)
            print(f"{title}, step {step}: factors {100 * mean:.1f} % lower than product (± {100 * half_width:.1f})")


def main() -> None:
    """Run all settings, print what they say, write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_seeds", type=int, default=8)
    seeds = range(parser.parse_args().num_seeds)
    everything = []
    for rank in (4, 16):
        for rate in (1e-4, 1e-3, 1e-2):
            title = f"rank {rank}, rate {rate:g}"
            plain = [train(seed, rank, rate, "none", "") for seed in seeds]
            report({"none": plain}, title)
            everything += plain
            for reach in CANDIDATES:
                groups = {way: [train(s, rank, rate, way, reach) for s in seeds] for way in ("factors", "product")}
                report(groups, f"{title}, candidates {reach}")
                everything += [run for runs in groups.values() for run in runs]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "lora_step_cpu-2core.json"
    path.write_text(json.dumps({"torch": torch.__version__, "runs": everything}) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
