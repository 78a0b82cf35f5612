"""Which arms fewer_rollouts.py runs with which seeds. Screening chose the arms of a claim on seeds of its own."""

from typing import Any

from fewer_rollouts_arms import Arm

SCREEN = range(20, 21)
FRESH_FIVE = range(30, 35)


def near(rollouts: int, lr: float, mini_batches: int = 1, passes: int = 1, **options: Any) -> Arm:
    """An arm of the near bar."""
    return Arm(rollouts, lr, mini_batches, passes, target="near", max_updates=256, **options)


def long(rollouts: int, lr: float, mini_batches: int = 1, passes: int = 1, **options: Any) -> Arm:
    """An arm of the long sandbox."""
    return Arm(rollouts, lr, mini_batches, passes, target="long", **options)


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
            near(8, 4e-4),
            near(32, 3e-4, 4, 4),
            near(32, 7e-4),
            near(256, 5e-4, 8, 4),
            near(512, 3e-4, 16, 2),
            near(512, 1e-3),
        ],
    ),
}
