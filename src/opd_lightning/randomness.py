"""Counter-based randomness: every random number is a pure function of what it is for.

A generator object remembers how far it has run, so a crash, another batch size or another number of processes changes
what it gives next. Here a seed is a hash of names and numbers (run seed, step, sample) and a uniform number is a hash
of a seed and a position. Nothing is remembered, so nothing has to be saved.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

# Mixing constants of splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB

# 48 bits leave room below the 53 of a float64: (1 - 2^-49) * total stays below total after rounding, so that
# inverse-CDF sampling can never run off the end of a cumulative sum.
_NUM_BITS = 48


def derive_seed(*parts: int | str) -> int:
    """Hash names and numbers to one seed in [0, 2^63).

    BLAKE2b over the type and the length-prefixed text of every part: stable across machines, Python versions and
    processes (unlike `hash`), and ("ab", "c") differs from ("a", "bc") as 1 differs from "1".

    Args:
        parts: What the seed is for, for example ``(run_seed, "rollout", step, position, sample)``.

    Raises:
        TypeError: A part is neither an integer nor a string (a float's text is not a stable name).
    """
    digest = blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"derive_seed: expected integers and strings, got {part!r} of type {type(part).__name__}.")
        text = str(part).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(text)}:".encode())
        digest.update(text)
    return int.from_bytes(digest.digest(), "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of one device.

    `torch.manual_seed` seeds every kind of device, and notes down the call stack for those not in use yet: that takes a
    millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def hashed_uniforms(seeds: Tensor, position: int | Tensor) -> Tensor:
    """One uniform number in (0, 1) per seed, for one position of its stream.

    Two rounds of the splitmix64 finaliser, in int64 tensor arithmetic that wraps alike on CPU and CUDA: the first
    spreads the seeds (neighbouring seeds give unrelated streams), the second adds the position.

    Args:
        seeds: int64 [B].
        position: Non-negative counter, for example the index of the token in the response. A tensor broadcasts
            against the seeds: seeds [B, 1] and positions [T] give [B, T], which is cheaper than T calls.

    Returns:
        float64 [B] (or the broadcast shape), multiples of 2^-48 shifted by half a step, so neither 0 nor 1 occurs.
    """
    assert seeds.dtype == torch.int64, seeds.dtype
    counter = (position + 1) * _signed(_GAMMA)
    mixed = _mix(_mix(seeds + _signed(_GAMMA)) + (_signed(counter) if isinstance(counter, int) else counter))
    return (_shift_right(mixed, 64 - _NUM_BITS).double() + 0.5) * 2.0**-_NUM_BITS


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MULTIPLIER_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MULTIPLIER_2)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, num_bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask clears the copies of the sign bit.
    return (bits >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(value: int) -> int:
    # The same 64 bits read as two's complement, which is what int64 arithmetic works on.
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
