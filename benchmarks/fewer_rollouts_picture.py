"""docs/fewer_rollouts.png: held-out divergence against rounds, generated tokens and seconds, from fewer_rollouts.py.

Hardware: any.
Command:  python benchmarks/fewer_rollouts_picture.py
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewer_rollouts import RESULTS
from fewer_rollouts_groups import SCREEN
from fewer_rollouts_report import read_long_sandbox
from sandbox_runs import read_runs

PICTURE = Path(__file__).parent.parent / "docs" / "fewer_rollouts.png"
COSTS = {"rounds": "rounds of generation", "tokens": "generated tokens", "seconds": "processor seconds"}
COLORS = ("tab:gray", "black", "tab:orange", "tab:blue")
PANELS = {  # title: arms with their labels
    "short sandbox, near bar": {
        "near rollouts=8 lr=0.0002": "plain, 8 rollouts a step",
        "near rollouts=32 lr=0.0005": "plain, 32 rollouts a step",
        "near rollouts=64 lr=0.0003 U=4x4": "rounds of 64, 4 passes of 4 updates",
        "near rollouts=128 lr=0.0003 U=4x8": "rounds of 128, 4 passes of 8 updates",
    },
    "long sandbox": {
        "long one round of 3,072": "one round of 3,072, again and again",
        "long rollouts=64 lr=0.001": "plain, 64 rollouts a step, 1e-3",
        "long rollouts=64 lr=0.002": "the same, 2e-3",
        "long rollouts=128 lr=0.0005 U=4x8": "rounds of 128, 4 passes of 8 updates, 5e-4",
    },
}


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per run, one row of panels per problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(len(PANELS), 3, figsize=(11, 3.2 * len(PANELS)), layout="constrained", sharey="row")
    for (title, arms), line in zip(PANELS.items(), axes, strict=True):
        for (arm, label), color in zip(arms.items(), COLORS, strict=False):
            members = [run for run in runs if run["arm"] == arm and run["seed"] not in SCREEN]
            for i, run in enumerate(members):
                for axis, cost in zip(line, COSTS, strict=True):
                    points = run["trajectory"][1:]  # nothing has been spent at the first one
                    axis.plot(
                        [point[cost] for point in points],
                        [point["kl"] for point in points],
                        color=color,
                        alpha=0.7,
                        linewidth=1.2,
                        marker=".",
                        label=None if i else label,
                    )
        bar = next(run["settings"]["bar"]["kl"] for run in runs if run["arm"] in arms)
        for axis, cost in zip(line, COSTS, strict=True):
            axis.axhline(bar, color="black", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", yscale="log", xlabel=COSTS[cost])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"{title}\nheld-out reverse KL (nats per token)")
        line[1].legend(fontsize=7, framealpha=0.6)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw([*read_runs(RESULTS), *read_long_sandbox()], PICTURE)
