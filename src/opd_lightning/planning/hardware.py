"""Hardware as a few numbers, and what an operation takes on it."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LIKELY_SHARE = 0.6  # of the peak that matrix products of a step reach on a GPU: an assumption


@dataclass(frozen=True)
class Operation:
    """What one operation of torch does.

    Attributes:
        flops: Of matrix products; 0 for everything else.
        bytes: Read and written.
        entries: Results of exponentials, logarithms and their like, in units of a SiLU.
        rows: Of the left factor of a product.
        is_low: Products of 16-bit numbers.
        is_attention: Products of keys, queries and values in one kernel.
    """

    flops: float = 0
    bytes: float = 0
    entries: float = 0
    rows: int = 0
    is_low: bool = False
    is_attention: bool = False


@dataclass(frozen=True)
class Hardware:
    """One device. What a data sheet does not say is 0, and then is not counted.

    Attributes:
        name: What it is called.
        memory_gb: Gigabytes (10^9) that it has.
        tflops: 10^12 operations a second of dense bfloat16 products.
        bandwidth_gb_s: Gigabytes a second from and to its memory.
        float32_tflops: The same of float32 products.
        source: Who says so.
        is_gpu: Whether it is one.
        attention_tflops: Of attention kernels.
        product_seconds: (rows of the left factor, seconds for each weight of the right one), fewest first, of float32
            products with weights that come from memory: their bytes are in it.
        bandwidths: (megabytes, gigabytes a second) of operations that read and write so much, smallest first, and write
            to memory that is given them for it.
        giga_entries_s: 10^9 SiLUs a second.
        call_us: Microseconds that an operation takes at least.
        factor: By which a layer takes longer than its operations one by one.
    """

    name: str
    memory_gb: float
    tflops: float
    bandwidth_gb_s: float
    float32_tflops: float
    source: str
    is_gpu: bool = True
    attention_tflops: float = 0.0
    product_seconds: Sequence[tuple[int, float]] = ()
    bandwidths: Sequence[tuple[float, float]] = ()
    giga_entries_s: float = 0.0
    call_us: float = 8.0
    factor: float = 1.0

    def seconds(self, operation: Operation) -> float:
        """What an operation takes.

        On a processor the parts add up: the call, the products, the bytes and the exponentials. A GPU is asked for the
        next operation while it works, and multiplies while it reads: the longest of call, products and bytes.
        """
        calling = 1e-6 * self.call_us
        rate = self.tflops if operation.is_low else self.float32_tflops
        if operation.is_attention:
            rate = self.attention_tflops or rate
        is_product = operation.flops > 0 and not operation.is_attention  # of weights that nobody has read for long
        multiplying = operation.flops / (1e12 * rate)
        bandwidth = self.bandwidth_gb_s if is_product else self._bandwidth(1e-6 * operation.bytes)
        passing = operation.bytes / (1e9 * bandwidth)
        if is_product and operation.rows and self.product_seconds:
            multiplying *= self._slowness(operation.rows)
            passing = 0.0
        if self.is_gpu:
            return max(calling, multiplying / _LIKELY_SHARE, passing)
        computing = operation.entries / (1e9 * self.giga_entries_s) if self.giga_entries_s else 0.0
        return self.factor * (calling + multiplying + passing + computing)

    def _slowness(self, rows: int) -> float:
        """How many times as long as at the best rate a product takes that has so many rows."""
        counts, seconds = zip(*self.product_seconds, strict=True)
        place = min(max(bisect(counts, rows), 1), len(counts) - 1)
        slope = (seconds[place] - seconds[place - 1]) / (counts[place] - counts[place - 1])
        taken = seconds[place - 1] + slope * (rows - counts[place - 1])
        return float(taken / rows * counts[-1] / seconds[-1])

    def _bandwidth(self, megabytes: float) -> float:
        if not self.bandwidths or megabytes <= 0:
            return self.bandwidth_gb_s
        sizes, speeds = zip(*self.bandwidths, strict=True)
        place = bisect(sizes, megabytes)
        if place in (0, len(sizes)):
            return float(speeds[max(0, place - 1)])
        share = math.log(megabytes / sizes[place - 1]) / math.log(sizes[place] / sizes[place - 1])
        return float(speeds[place - 1] * (speeds[place] / speeds[place - 1]) ** share)


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
