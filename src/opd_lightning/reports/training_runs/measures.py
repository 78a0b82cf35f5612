"""What matters in a run: which metrics are drawn together, and what the papers say of their healthy ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from opd_lightning.reports.contents import Curve, Panel
from opd_lightning.reports.training_runs.folder import Run, Series

MOST_POINTS = 400  # of a curve; more are drawn as the means of so many bins
X_LABEL = "optimiser steps made"
PAPER = "arXiv 2604.13016"
TIME_PARTS = ("wait", "generate", "sync", "grade", "teacher", "student", "optimizer")


@dataclass(frozen=True)
class Measure:
    """Some metrics on common axes.

    Attributes:
        title: Heading of the drawing, and row of the table.
        unit: What is up.
        metrics: (label, pattern of the metric's whole name) pairs; those a run lacks are left out.
        bands: Healthy ranges.
        note: What the range means, and where it comes from.
        instead: Metrics that are shown only where none of the others is known.
        scale: What values are multiplied with.
    """

    title: str
    unit: str
    metrics: Sequence[tuple[str, str]]
    bands: Sequence[tuple[float, float]] = ()
    note: str = ""
    instead: Sequence[tuple[str, str]] = ()
    scale: float = 1.0


MEASURES = (
    Measure(
        "Reverse KL",
        "nats per token",
        (("rollouts", "train/reverse_kl"), ("held out", "val/reverse_kl")),
        note="Of the student to the teacher, on answers just sampled and not yet trained on. Should fall; no range is"
        " published, since its size depends on the pair.",
        instead=(("log-ratio at the sampled token", "train/sampled_log_ratio"),),
    ),
    Measure(
        "Accuracy",
        "share right",
        (("rollouts", "train/accuracy"), ("held out", r"val/avg_at_\d+")),
        note="Bars: 95 % (Wilson), each held-out problem counted once. Rollouts are of training prompts and lengths.",
    ),
    Measure(
        "Overlap of the top-k lists",
        "share of k",
        (("rollouts", "train/overlap_ratio"), ("held out", "val/overlap_ratio")),
        ((0.9, 1.0),),
        f"Shaded: where a run that succeeded came to. It rose from 0.72 to 0.92 in 200 steps; one that taught nothing"
        f" began higher, at 0.745, and stayed below 0.78. Rising is what counts ({PAPER}; read off curves, one seed).",
    ),
    Measure(
        "Probability mass on the overlap",
        "share",
        (("student", "train/overlap_mass_student"), ("teacher", "train/overlap_mass_teacher")),
        ((0.97, 1.0),),
        f"Shaded: 0.97 to 0.99 throughout, in runs that succeeded and in runs that did not ({PAPER}, section 3).",
    ),
    Measure(
        "Entropy",
        "nats per token",
        (("student", "train/student_entropy"), ("teacher", "train/teacher_entropy")),
        ((0.0, 0.7),),
        "Shaded: below 0.7. A third party's replication went from 1.14 to 3.18 nats within 20 steps and broke; from"
        f" 0.31 to 0.23 it was stable. 0.7 lies between and is our choice ({PAPER} prints no range).",
    ),
    Measure(
        "Gap of the entropies",
        "nats per token",
        (("mean of |H(q) - H(p)|", "train/entropy_gap"),),
        note=f"Closes in runs that succeed and does not in those that fail ({PAPER}, section 3; no numbers printed).",
    ),
    Measure(
        "Response length",
        "tokens",
        (("rollouts", "train/response_length"), ("held out", "val/response_length")),
        note=f"For long reasoning, limits of 3K and 7K taught best; at 10K and 15K late tokens hurt ({PAPER}, 5).",
    ),
    Measure(
        "Answers cut or repeating",
        "share",
        (
            ("cut", "train/truncation_rate"),
            ("cut, held out", "val/truncation_rate"),
            ("cut by the horizon", "train/horizon_cut_rate"),
            ("repeated 8-grams", "train/repetition_rate"),
        ),
        note="No range is published. Cut answers are marked wrong whatever they would have said.",
    ),
    Measure(
        "Gradient norm",
        "before clipping",
        (("norm", "train/grad_norm"),),
        note=f"Spikes accompany late collapses; a run that taught nothing had a persistently small one ({PAPER}).",
    ),
    Measure(
        "Learning rate",
        "first group",
        (("rate", "train/learning_rate"),),
        note=f"{PAPER} and 2605.11739 train models of 1.5B to 14B at a constant 1e-6; small models need more.",
    ),
    Measure(
        "Engine against student",
        "nats per token",
        (("mean of |log p(y) - log p_rollout(y)|", "train/rollout_mismatch"),),
        note="How far the engine that sampled is from the student that trains; 0 up to rounding where they are one.",
    ),
)
SPEED = Measure(
    "Speed",
    "tokens per second",
    (
        ("generate", "train/tokens_per_second/generate"),
        ("teacher", "train/tokens_per_second/teacher"),
        ("student", "train/tokens_per_second/student"),
    ),
    note="Response tokens, of each part by itself, per process.",
)
MEMORY = Measure(
    "Memory of the GPU",
    "GiB",
    tuple(
        (f"{kind}, most so far", rf"DeviceStatsMonitor\.on_train_batch_end/{kind}_bytes\.all\.peak")
        for kind in ("allocated", "reserved")
    ),
    note="Of the first process, as Lightning's DeviceStatsMonitor logged it.",
    scale=2.0**-30,
)

MEMORY_BY_PART = Measure(
    "Memory by part of a step",
    "GB",
    tuple(
        (part.replace("_", " "), rf"train/memory_gb/{part}")
        for part in ("between_steps", "teacher", "student", "optimizer")
    ),
    note="Most held at once (model.measure_memory): of the GPU by tensors, else by the whole process.",
)


def panels_of(measure: Measure, runs: Sequence[Run]) -> list[Panel]:
    """The drawing of a measure, if any run knows some of its metrics.

    Of one run each metric has a colour; several runs have a colour each, and their metrics differ by their dashes.
    """
    curves = curves_of(measure, runs)
    if not curves:
        return []
    return [Panel(measure.title, X_LABEL, measure.unit, curves, measure.bands, note=measure.note)]


def curves_of(measure: Measure, runs: Sequence[Run]) -> list[Curve]:
    """A curve for each metric of each run that knows it; held-out accuracy with intervals."""
    curves = []
    for number, run in enumerate(runs):
        known = known_metrics(measure, run)
        for place, (label, name) in enumerate(known):
            xs, ys = thinned(run.series[name])
            if not xs:
                continue
            several = len(runs) > 1
            curves.append(
                Curve(
                    label if not several else run.label if len(known) == 1 else f"{run.label}: {label}",
                    xs,
                    [measure.scale * y for y in ys],
                    intervals=accuracy_intervals(run, name) if len(xs) == len(run.series[name]) else (),
                    colour=number if several else None,
                    dash=place if several else 0,
                    run=number if several else None,
                )
            )
    return curves


def known_metrics(measure: Measure, run: Run) -> list[tuple[str, str]]:
    """(label, name) of the metrics that a run has."""
    for wanted in (measure.metrics, measure.instead):
        found = [(label, name) for label, pattern in wanted for name in run.series if re.fullmatch(pattern, name)]
        if found:
            return found
    return []


def thinned(series: Series) -> tuple[list[float], list[float]]:
    """Steps and values that are numbers; of more than `MOST_POINTS`, the means of as many bins."""
    points = [(step, value) for step, value in series.items() if math.isfinite(value)]
    count = min(len(points), MOST_POINTS)
    bins = [points[i * len(points) // count : (i + 1) * len(points) // count] for i in range(count)]
    xs, ys = ([sum(point[axis] for point in each) / len(each) for each in bins] for axis in (0, 1))
    return xs, ys


def accuracy_intervals(run: Run, name: str) -> list[tuple[float, float]]:
    """95 % intervals of a held-out accuracy; nothing for what is no share or of an unknown number."""
    sizes = run.series.get("val/num_problems", {})
    values = run.series[name]
    if not re.fullmatch(r"val/avg_at_\d+", name) or not values.keys() <= sizes.keys():
        return []
    known = [(value, sizes[step]) for step, value in values.items() if math.isfinite(value)]
    return [wilson(*each) for each in known] if all(0 <= value <= 1 and count > 0 for value, count in known) else []


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of so many; at 0 and 1 it has a width too."""
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))


def mean_of_steps(series: Series, *, last: bool, count: int = 5) -> float | None:
    """Mean of the first or last values that are numbers, of half of them at most; None without any."""
    values = [value for value in series.values() if math.isfinite(value)]
    count = max(1, min(count, len(values) // 2))  # the first ones and the last share none
    chosen = values[-count:] if last else values[:count]
    return sum(chosen) / len(chosen) if chosen else None
