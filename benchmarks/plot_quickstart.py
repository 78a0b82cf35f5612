"""Draw docs/quickstart.png from the metrics file of a quickstart run.

Command: python benchmarks/plot_quickstart.py [METRICS_CSV]
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "quickstart_cpu-2core.csv"


def read_column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Steps (counted from 1 after the step) and values of one metric."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]


def main(path: Path = COMMITTED) -> None:
    """Two panels: divergence from the teacher, and sampled accuracy."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps, divergence = read_column(rows, "train/reverse_kl")
    left.plot([step + 1 for step in steps], divergence, color="tab:blue")
    left.set(title="reverse KL to the teacher (nats per token)", xlabel="step", yscale="log")
    steps, accuracy = read_column(rows, "train/accuracy")
    right.plot([step + 1 for step in steps], accuracy, color="tab:blue", alpha=0.4, label="training rollouts (64)")
    steps, accuracy = read_column(rows, "val/avg_at_1")
    right.plot([0, *(step + 1 for step in steps[1:])], accuracy, "o-", color="tab:orange", label="validation (256)")
    right.set(title="sampled accuracy", xlabel="step", ylim=(0, 1))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / "quickstart.png", dpi=120)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
