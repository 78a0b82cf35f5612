"""Which arms fewer_rollouts.py runs with which seeds; screening has a seed of its own."""

from dataclasses import replace
from typing import Any

from fewer_rollouts_arms import Arm

SCREEN = range(20, 21)
FRESH_FIVE = range(30, 35)


def near(rollouts: int, lr: float, mini_batches: int = 1, passes: int = 1, **options: Any) -> Arm:
    """An arm of the near bar."""
    return Arm(rollouts, lr, mini_batches, passes, target="near", max_updates=128, **options)


def long(rollouts: int, lr: float, mini_batches: int = 1, passes: int = 1, **options: Any) -> Arm:
    """An arm of the long sandbox."""
    return Arm(rollouts, lr, mini_batches, passes, **{"target": "long"} | options)


SMALL_ROUNDS = near(64, 3e-4, 4, 4)
CHECKED = replace(SMALL_ROUNDS, max_kl=0.2, search=32)
NEAR = [near(128, 3e-4, 8, 4), near(32, 5e-4), SMALL_ROUNDS]
LONG_SMALL = long(64, 3e-4, 4, 4)
LONG = long(128, 5e-4, 8, 4)
LONG_TUNED = long(64, 2e-3, evaluate_every=5, max_updates=90)
GROUPS: dict[str, tuple[range, list[Arm]]] = {  # seeds, arms; most important first
    "near-screen": (
        SCREEN,
        [
            near(64, 5e-4),
            near(64, 3e-4, 4, 4),
            near(32, 5e-4),
            near(16, 3e-4),
            near(128, 3e-4, 8, 4),
            near(64, 3e-4, 4, 8),
            near(16, 5e-4),
            near(8, 2e-4),
            near(256, 3e-4, 16, 2),
            near(256, 1e-3),
        ],
    ),
    "near": (range(30, 33), NEAR),
    "long": (range(1), [LONG_SMALL, long(128, 5e-4, 8, 4)]),  # the seed of the plain run in long_sandbox.py
    "long-plain": (range(1), [long(32, 1e-3, evaluate_every=5)]),
    "long-far": (range(1, 2), [long(128, 5e-4, 8, 4)]),
    "near-claim": (FRESH_FIVE, NEAR[:2]),
    "near-more": (FRESH_FIVE, NEAR),
    "controls": (
        range(30, 31),
        [
            replace(SMALL_ROUNDS, is_behind=True),  # rollouts of one round before
            near(64, 3e-4, 4, 1),  # several updates without a second pass
            replace(SMALL_ROUNDS, blind=0.5),  # goes back half of every round, unasked
            near(64, 5e-4, penalty=True, evaluate_every=8),  # a fixed negative advantage
        ],
    ),
    "near-plain": (FRESH_FIVE, [near(16, 3e-4)]),
    "checked": (range(30, 33), [CHECKED]),
    "near-plain-few": (range(30, 31), [near(8, 2e-4), near(256, 1e-3)]),
    "long-more": (range(30, 33), [LONG_SMALL, long(64, 1e-3, evaluate_every=5), replace(LONG_SMALL, horizon=32)]),
    "long-screen": (
        SCREEN,
        [
            long(64, 2e-3, evaluate_every=5, max_updates=40),
            long(64, 5e-4, evaluate_every=5, max_updates=40),
            long(128, 1e-3, evaluate_every=4, max_updates=24),
            long(32, 2e-3, evaluate_every=5, max_updates=60),
        ],
    ),
    "long-claim": (FRESH_FIVE, [LONG, long(64, 1e-3, evaluate_every=5)]),
    "long-tuned": (FRESH_FIVE, [LONG_TUNED]),
    "long-tuned-first": (range(1), [LONG_TUNED]),
    "long-screen-reuse": (SCREEN, [long(128, 1e-3, 8, 4, max_updates=240), replace(LONG, max_updates=240)]),
    "long-reuse-tuned": (FRESH_FIVE, [long(128, 1e-3, 8, 4, max_updates=96)]),  # to the near bar
    "long-reuse-decay": (FRESH_FIVE, [long(128, 1e-3, 8, 4, decay=256, max_updates=256)]),
    "long-plain-decay": (FRESH_FIVE, [long(64, 2e-3, decay=64, evaluate_every=5, max_updates=64)]),
    "long-arrived": (
        FRESH_FIVE,
        [
            replace(LONG, target="long-arrived"),
            long(64, 1e-3, evaluate_every=5, target="long-arrived"),
            replace(LONG, target="long-arrived", average=0.97),
        ],
    ),
    "long-horizon": (range(30, 32), [replace(LONG, horizon=32)]),
    "long-vllm": (  # in an environment with vLLM
        range(30, 32),
        [replace(LONG, vllm=True), replace(LONG_TUNED, vllm=True), replace(LONG_TUNED, ahead=True)],
    ),
    "far-checked": (range(30, 32), [Arm(256, 2e-4, 8, 4, max_kl=0.2, search=64)]),
    "near-lora": (range(30, 33), [near(128, 1e-3, 8, 4, lora=8), near(32, 2e-3, lora=8)]),
    "near-average": (range(30, 33), [near(32, 1e-3, average=0.8), near(32, 1e-3, decay=40)]),
    "far-average": (
        range(30, 32),
        [Arm(64, 5e-4, average=0.95, evaluate_every=8), Arm(256, 2e-4, 8, 4, average=0.97)],
    ),
    "far": (
        FRESH_FIVE,
        [
            Arm(1024, 2e-4, 16, 4),
            Arm(256, 2e-4, 8, 4),
            Arm(256, 1e-3, evaluate_every=4),
            Arm(64, 3e-4, evaluate_every=8),
            Arm(32, 2e-4, evaluate_every=16),
        ],
    ),
}
