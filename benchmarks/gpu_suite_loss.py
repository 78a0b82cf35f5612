"""The loss on a GPU: time against its four matrix products, memory, and error against float64 on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.interfaces import LinearHead, ResponseTokens, ScoreRequest
from opd_lightning.objectives import DivergenceObjective, HiddenScores, compare_in_chunks

NUM_REPEATS = 5
NUM_CHECKED = 64  # tokens that float64 goes through on the CPU


@dataclass(frozen=True)
class Heads:
    """Sizes: V, widths of student and teacher, N tokens."""

    vocabulary: int
    student: int
    teacher: int
    num_tokens: int


REAL = {
    "0.6B / 1.7B": Heads(151_936, 1024, 2048, 8192),
    "1.7B / 4B": Heads(151_936, 2048, 2560, 8192),
}
TINY = {"tiny": Heads(500, 16, 24, 96)}


class Material:
    """Hidden states and heads, weights in float32 as `bf16-mixed` keeps them.

    Args:
        heads: Sizes.
        device: Where.
        precision: "bfloat16" runs products under autocast.
    """

    def __init__(self, heads: Heads, device: torch.device, precision: str) -> None:
        self.device, self.dtype = device, getattr(torch, precision)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=generator, device=device)

        n, v = heads.num_tokens, heads.vocabulary
        self.hidden = normal(n, heads.student).to(self.dtype).requires_grad_()
        self.weight = normal(v, heads.student, scale=3 / heads.student**0.5).requires_grad_()
        self.teacher_hidden = normal(n, heads.teacher).to(self.dtype)
        self.teacher_weight = normal(v, heads.teacher, scale=3 / heads.teacher**0.5).to(self.dtype)
        ids = torch.randint(v, (n,), generator=generator, device=device)
        self.tokens = ResponseTokens(ids, normal(n) - 8, torch.arange(n, device=device))
        self.teacher = HiddenScores(self.teacher_hidden, ids, LinearHead(self.teacher_weight, None, v))
        self.vocabulary = v

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the products."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def losses(self, num_tokens: int, facts_k: int) -> Tensor:
        """Of the first tokens, their gradient formed too."""
        self.hidden.grad = self.weight.grad = None
        rows = slice(0, num_tokens)
        asked = ScoreRequest(full_vocabulary=True) if facts_k else None
        with self.autocast():
            compared = compare_in_chunks(
                self.hidden[rows],
                LinearHead(self.weight, None, self.vocabulary),
                DivergenceObjective(),
                self.teacher.slice(0, num_tokens),
                self.tokens[rows],
                asked=asked,
                facts_k=facts_k,
            )
        compared.losses.mean().backward()
        return compared.losses.detach()

    def products(self) -> None:
        """The four products alone, in chunks, into memory that is used again."""
        hidden, weight = self.hidden.detach(), self.weight.detach().to(self.dtype)
        size = DivergenceObjective().chunk_tokens
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = hidden[rows] @ weight.T
            _ = self.teacher_hidden[rows] @ self.teacher_weight.T
            of_hidden[rows] = logits @ weight
            of_weight.addmm_(logits.T, hidden[rows])


def measure_loss(device: torch.device, precision: str, *, is_tiny: bool) -> dict[str, Any]:
    """Seconds, memory and errors for every pair of heads."""
    found: dict[str, Any] = {"pairs": {}, "summary": {}}
    for name, heads in (TINY if is_tiny else REAL).items():
        material = Material(heads, device, precision)
        works: dict[str, Callable[[], object]] = {
            "four products": material.products,
            "reverse KL, all metrics": lambda m=material, n=heads.num_tokens: m.losses(n, 16),
            "reverse KL": lambda m=material, n=heads.num_tokens: m.losses(n, 0),
        }
        measured = {what: {"seconds": seconds_of(work, device)} for what, work in works.items()}
        if device.type == "cuda":
            for what, work in works.items():
                measured[what]["peak_gb"] = [peak_gb(work, material)]
        floor = statistics.median(measured["four products"]["seconds"])
        errors = errors_of(material)
        found["pairs"][name] = {"measured": measured, "errors": errors}
        found["summary"][name] = errors | {
            f"{what}, times the products": statistics.median(values["seconds"]) / floor
            for what, values in measured.items()
        }
        del material, works
    return found


def seconds_of(work: Callable[[], object], device: torch.device) -> list[float]:
    """Wall-clock seconds of several runs, after two that are not counted."""
    seconds = []
    for _ in range(NUM_REPEATS + 2):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gb(work: Callable[[], object], material: Material) -> float:
    """Most gigabytes above what was there before."""
    material.hidden.grad = material.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - there) / 1e9


def errors_of(material: Material) -> dict[str, float]:
    """Largest error of losses and gradients, as a share of the largest entry, against float64 on the CPU."""
    num = min(NUM_CHECKED, len(material.hidden))
    losses = material.losses(num, 0).cpu().double()
    assert material.hidden.grad is not None and material.weight.grad is not None
    ours = losses, material.hidden.grad[:num].cpu().double(), material.weight.grad.cpu().double()
    hidden = material.hidden[:num].detach().cpu().double().requires_grad_()
    weight = material.weight.detach().cpu().double().requires_grad_()
    log_p = (hidden @ weight.T).log_softmax(-1)
    log_q = (material.teacher_hidden[:num].cpu().double() @ material.teacher_weight.cpu().double().T).log_softmax(-1)
    true = (log_p.exp() * (log_p - log_q)).sum(-1)
    true.mean().backward()
    assert hidden.grad is not None and weight.grad is not None
    references = true.detach(), hidden.grad, weight.grad
    names = "error of losses", "error of gradient of hidden states", "error of gradient of head"
    return {
        name: float((found - right).abs().max() / right.abs().max())
        for name, found, right in zip(names, ours, references, strict=True)
    }
