"""Hardware as a few numbers, and what an operation takes on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_LIKELY_SHARE = 0.6  # of the peak that matrix products of a step reach on a GPU: an assumption


@dataclass(frozen=True)
class Operation:
    """What one operation of torch does.

    Attributes:
        flops: Of matrix products; 0 for everything else.
        bytes: Read and written.
        entries: Results of exponentials, logarithms and their like.
        is_low: Products of 16-bit numbers.
        is_attention: Products of keys, queries and values in one kernel.
    """

    flops: float = 0
    bytes: float = 0
    entries: float = 0
    is_low: bool = False
    is_attention: bool = False


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: What it is called.
        memory_gb: Gigabytes (10^9) that it has.
        tflops: 10^12 operations a second of dense bfloat16 products.
        bandwidth_gb_s: Gigabytes a second from and to its memory.
        float32_tflops: The same of float32 products.
        source: Who says so.
        is_gpu: Whether it is one.
        attention_tflops: Of attention kernels; 0 takes those of products.
        cache_mb: Tensors up to this size are read from its cache; 0 for no difference.
        cache_gb_s: Gigabytes a second from and to that cache.
        giga_entries_s: 10^9 exponentials a second; 0 for as many as memory brings.
        call_us: Microseconds that an operation takes at least.
    """

    name: str
    memory_gb: float
    tflops: float
    bandwidth_gb_s: float
    float32_tflops: float
    source: str
    is_gpu: bool = True
    attention_tflops: float = 0.0
    cache_mb: float = 0.0
    cache_gb_s: float = 0.0
    giga_entries_s: float = 0.0
    call_us: float = 8.0

    @property
    def is_measured(self) -> bool:
        """Whether its numbers were measured here, and are no peaks of a data sheet."""
        return not self.is_gpu

    def seconds(self, operation: Operation) -> float:
        """What an operation takes, at least its call: products by their operations or their bytes, others by bytes."""
        is_near = self.cache_mb > 0 and operation.bytes <= 1e6 * self.cache_mb
        passing = operation.bytes / (1e9 * (self.cache_gb_s if is_near else self.bandwidth_gb_s))
        if operation.flops:
            rate = self.tflops if operation.is_low else self.float32_tflops
            if operation.is_attention and self.attention_tflops:
                rate = self.attention_tflops
            share = _LIKELY_SHARE if self.is_gpu else 1.0
            working = max(operation.flops / (1e12 * rate * share), passing)
        elif self.giga_entries_s:
            working = passing + operation.entries / (1e9 * self.giga_entries_s)
        else:
            working = passing
        return max(working, 1e-6 * self.call_us) if self.is_gpu else working + 1e-6 * self.call_us


def _nvidia(
    name: str, memory_gb: float, tflops: float, bandwidth_gb_s: float, float32_tflops: float, sheet: str
) -> Hardware:
    return Hardware(name, memory_gb, tflops, bandwidth_gb_s, float32_tflops, f"NVIDIA, {sheet}")


HARDWARE: Mapping[str, Hardware] = {
    each.name: each
    for each in (  # dense products; where a sheet names sparse ones, half of them
        _nvidia("B200", 180, 2250, 8000, 75, "Blackwell data sheet (HGX)"),
        _nvidia("H200", 141, 989, 4800, 67, "H200 data sheet (SXM)"),
        _nvidia("H100", 80, 989, 3350, 67, "H100 data sheet (SXM)"),
        _nvidia("H100-PCIe", 80, 756, 2000, 51, "H100 data sheet (PCIe)"),
        _nvidia("A100-80GB", 80, 312, 2039, 19.5, "A100 data sheet (SXM)"),
        _nvidia("A100-40GB", 40, 312, 1555, 19.5, "A100 data sheet"),
        _nvidia("L40S", 48, 362, 864, 91.6, "L40S data sheet"),
        _nvidia("L4", 24, 121, 300, 30.3, "L4 data sheet"),
        _nvidia("A10", 24, 125, 600, 31.2, "A10 data sheet"),
        _nvidia("RTX-A6000", 48, 155, 768, 38.7, "GA102 white paper"),
        _nvidia("RTX-5090", 32, 209.5, 1792, 104.8, "Blackwell GPU architecture paper"),
        _nvidia("RTX-4090", 24, 165.2, 1008, 82.6, "Ada GPU architecture paper"),
        _nvidia("RTX-3090", 24, 71, 936, 35.6, "GA102 white paper"),
    )
}
