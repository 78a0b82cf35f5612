"""The picture of benchmarks/README.md: held-out divergence against steps, seconds and tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("tab:gray", "tab:orange", "tab:blue", "tab:green", "tab:red")
SEEDS = range(5)  # later ones belong to a second session; a rate that this one lacks is drawn from there
CAUTIOUS = {
    "opd": "plain OPD",
    "effopd-accuracy": "EffOPD as in the paper (accuracy)",
    "effopd-kl": "EffOPD, TeacherKL",
    "effopd-fixed": "EffOPD, TeacherKLOnFixedRollouts",
    "dense-fixed": "the same, searched at 1, 2, 4, 8, 12, ...",
}
PANELS = {
    "rate 5e-5": {f"{method} lr=5e-05 prompts=64": label for method, label in CAUTIOUS.items()},
    "rate 1e-4": {f"{method} lr=0.0001 prompts=64": label for method, label in CAUTIOUS.items()},
    "tuned rates": {
        "opd lr=0.0005 prompts=64": "plain OPD, 5e-4",
        "two-sided-kl lr=0.0005 prompts=64": "two-sided, TeacherKL, 5e-4",
        "opd lr=0.001 prompts=64 warmup=4 decay=24": "plain OPD, 1e-3 with warm-up and decay",
        "two-sided-kl lr=0.001 prompts=64": "two-sided, TeacherKL, 1e-3",
    },
    "rate 2e-3": {
        "opd lr=0.002 prompts=64": "plain OPD",
        "two-sided-kl lr=0.002 prompts=64": "two-sided, TeacherKL",
        "dense-two-sided-fixed lr=0.002 prompts=64": "two-sided, fixed rollouts, searched at 1, 2, 4, 8, 12, ...",
    },
}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Divergence against steps, seconds and tokens, one line per run, one row of panels per learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PANELS), 3, figsize=(11, 3 * len(PANELS)), layout="constrained", sharey=True)
    for (title, arms), line in zip(PANELS.items(), axes, strict=True):
        for (arm, label), color in zip(arms.items(), COLORS, strict=False):
            members = [run for run in runs if run["arm"] == arm and (run["seed"] in SEEDS or "2e-3" in title)]
            for i, run in enumerate(members):
                for axis, cost in zip(line, ("step", "seconds", "tokens"), strict=True):
                    scale = 1000 if cost == "tokens" else 1
                    costs = [point[cost] / scale for point in run["trajectory"]]
                    divergences = [point["kl"] for point in run["trajectory"]]
                    axis.plot(costs, divergences, color=color, alpha=0.6, linewidth=1.2, label=None if i else label)
        for axis, cost in zip(line, ("optimiser steps", "processor seconds", "1000 generated tokens"), strict=True):
            axis.axhline(runs[0]["settings"]["bar"]["kl"], color="black", linewidth=0.8, linestyle=":")
            axis.set(yscale="log", xlabel=cost)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"{title}\nheld-out reverse KL (nats per token)")
        line[0].legend(fontsize=7, loc="upper right")
    figure.suptitle("searches included; the dotted line is the bar")
    figure.savefig(path, dpi=110)
