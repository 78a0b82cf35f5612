"""An analysis of a run's updates as words, tables and curves, and as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from opd_lightning.commands.norm_scaling import Variant, recovered
from opd_lightning.commands.update_geometry import AVERAGED, RunGeometry
from opd_lightning.reports.contents import Curve, Panel, Report, Statement, Table, number, share

SHOWN_POINTS = 12  # rows of a table; JSON and page curves have all
SHOWN_DIRECTIONS = (1, 5, 10, 20)
SHORT = 5  # points below which the trajectory's first two components say nothing


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Attributes:
        run: Folder of the run.
        start: Where its first weights are; None where updates stand for themselves.
        points: The files, by increasing step.
        dtypes: In which weights are stored; empty where updates are.
        is_low_rank: Whether the updates are products of LoRA factors.
        early: Which point stands for early in training.
        geometry: The updates.
        variants: What became of other weights on held-out problems; empty when that was not asked for.
    """

    run: str
    start: str | None
    points: list[str]
    dtypes: list[str]
    is_low_rank: bool
    early: int
    geometry: RunGeometry
    variants: list[Variant] = field(default_factory=list)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Every number, plain; None for what is not known."""
    geometry = analysis.geometry
    points = range(len(geometry.steps))
    means = {
        "attention_and_mlp": [geometry.mean_spectrum(i) for i in points],
        **{kind: [geometry.mean_spectrum(i, (kind,)) for i in points] for kind in AVERAGED},
    }
    plain = asdict(analysis) | {
        "means": means,
        "mean_subspace_cosines": [geometry.mean_subspace_cosines(i) for i in points],
        "variance_in_two_components": sum(geometry.variance[:2]),
        "recovery": [_recovery(analysis.variants, each) for each in analysis.variants],
    }
    known: dict[str, Any] = _without_nan({"version": 1, **plain})
    return known


def make_report(analysis: Analysis) -> Report:
    """What people read."""
    geometry = analysis.geometry
    tables = [_spectra_table(geometry), _directions_table(geometry), _layer_table(geometry)]
    if any(each.shift is not None for each in geometry.averaged):
        tables.append(_shift_table(geometry))
    if analysis.variants:
        tables.append(_variants_table(analysis.variants))
    tables.append(_matrix_table(geometry))
    return Report(
        title="Weight updates of a run",
        subtitle=(
            f"{analysis.run}: {len(geometry.steps)} points, steps {geometry.steps[0]} to {geometry.steps[-1]},"
            f" {len(geometry.matrices)} matrices, measured from {analysis.start or 'zero (a fresh adapter)'}."
        ),
        statements=_statements(analysis),
        tables=tables,
        panels=_panels(analysis),
        notes=_notes(analysis),
    )


def _statements(analysis: Analysis) -> list[Statement]:
    geometry, i = analysis.geometry, analysis.early
    step, passed = _step(geometry, i)
    cosine, of_walk = number(_known(geometry.cosine_to_last[i]), 2), number(geometry.random_walk_cosine[i], 2)
    held, by_walk = (share(_known(sum(each[:2]))) for each in (geometry.variance, geometry.random_walk_variance))
    return [
        Statement(
            f"The update of step {step} ({passed} of training) has cosine {cosine} with the last; steps without a"
            f" common direction would give {of_walk}.",
            (("source", "direction lock-in, arXiv 2605.11739 section 3; a random walk has sqrt(t / T)"),),
        ),
        Statement(
            f"Two components hold {held} of the trajectory's variance; steps without a common direction would give"
            f" {by_walk}.",
            (("source", "EVR_0:2, arXiv 2605.11739; principal components of random walks, arXiv 1806.08805"),),
        ),
    ]


def _spectra_table(geometry: RunGeometry) -> Table:
    rows = []
    for i in _shown(len(geometry.steps)):
        mean = geometry.mean_spectrum(i)
        unchanged = sum(each.unchanged[i] for each in geometry.averaged) / len(geometry.averaged)
        rows.append(
            (
                *_step(geometry, i),
                number(_known(mean["frobenius"])),
                number(_known(mean["spectral"])),
                share(_known(mean["spectral_share"])),
                number(_known(mean["effective_rank"]), 4),
                share(_known(mean["top_share"])),
                number(_known(mean["rank"]), 4),
                number(_known(mean["stable_rank"])),
                share(unchanged),
            )
        )
    columns = ("step", "of run", "size", "s1", "s1/F", "eff. rank", "top 1 %", "rank", "st. rank", "unmoved")
    largest = max(min(each.shape) for each in geometry.averaged)
    note = (
        f"Means over {len(geometry.averaged)} attention and MLP matrices (size: Frobenius norm of all together). The"
        f" full rank is at most {largest}. Unmoved: entries that are what they were, bit for bit."
    )
    return Table("Spectra", columns, rows, note)


def _directions_table(geometry: RunGeometry) -> Table:
    shown = [k for k in SHOWN_DIRECTIONS if k <= len(geometry.chance)]
    rows = []
    for i in _shown(len(geometry.steps)):
        curve = geometry.mean_subspace_cosines(i)
        cosines = [number(_known(curve[k - 1]) if k <= len(curve) else None) for k in shown]
        whole = number(_known(geometry.cosine_to_last[i]))
        rows.append((*_step(geometry, i), whole, number(geometry.random_walk_cosine[i]), *cosines))
    rows.append(("chance", "", "0", "", *(number(geometry.chance[k - 1]) for k in shown)))
    columns = ("step", "of run", "whole", "walk", *(f"top {k}" for k in shown))
    note = (
        "Cosines with the last update: of the whole update (walk: what steps without a common direction would give),"
        " and of its k leading directions: root mean square over the k angles of the singular subspaces, left and"
        " right, averaged over matrices."
    )
    return Table("When directions settle", columns, rows, note)


def _layer_table(geometry: RunGeometry) -> Table:
    rows = []
    for layer in sorted({each.layer for each in geometry.averaged if each.layer is not None}):
        cells = [str(layer)]
        for kind in AVERAGED:
            mean = geometry.mean_spectrum(-1, (kind,), layer)
            cells += [number(_known(mean[name])) for name in ("frobenius", "effective_rank")]
            cells.append(share(_known(mean["spectral_share"])))
        rows.append(cells)
    columns = ["layer"]
    for kind in ("attention", "MLP"):
        columns += [f"{kind}: size", "eff. rank", "s1/F"]
    others = [each for each in geometry.matrices if each not in geometry.averaged]
    note = "".join(f" {each.name}: Frobenius {number(each.frobenius[-1])}." for each in others if each.layer is None)
    return Table("Layers, at the last point", columns, rows, note.strip())


def _shift_table(geometry: RunGeometry) -> Table:
    rows = []
    for kind in AVERAGED:
        shifts = [each.shift for each in geometry.averaged if each.kind == kind and each.shift is not None]
        if shifts:
            names = ("unmoved", "spectrum_shift", "mean_angle", "largest_angle")
            means = {name: sum(getattr(each, name) for each in shifts) / len(shifts) for name in names}
            cells = (share(means["unmoved"]), share(means["spectrum_shift"]))
            rows.append((kind, *cells, *(number(math.degrees(means[name])) for name in names[2:])))
    columns = ("matrices", "unmoved for bfloat16", "spectrum shift", "mean angle", "largest angle")
    note = (
        "Means over matrices. Unmoved: by no more than 0.001 of their size. Spectrum shift: of the singular values,"
        " relative. Angles in degrees, between the leading 20 singular directions of both, left and right."
    )
    return Table("Weights against their start, at the last point", columns, rows, note)


def _matrix_table(geometry: RunGeometry) -> Table:
    rows = []
    for each in geometry.matrices:
        last = each.spectra[-1] if each.spectra else None
        rows.append(
            (
                each.name,
                " x ".join(map(str, each.shape)),
                number(each.frobenius[-1]),
                share(_known(last.spectral_share) if last else None),
                number(_known(last.effective_rank) if last else None, 4),
                share(_known(last.top_share) if last else None),
                number(last.rank if last else None),
            )
        )
    columns = ("matrix", "shape", "size", "s1/F", "eff. rank", "top 1 %", "rank")
    return Table("Every matrix, at the last point", columns, rows, "Embeddings: size and cosines only.")


def _variants_table(tried: Sequence[Variant]) -> Table:
    rows = []
    for each in tried:
        accuracy, divergence = _recovery(tried, each).values()
        rows.append((each.label, share(each.accuracy), share(accuracy), number(each.reverse_kl), share(divergence)))
    columns = ("weights", "accuracy", "of the gain", "reverse KL to the teacher", "of the fall")
    note = (
        f"{tried[0].num_answers} held-out answers each, the same problems and seeds. Scale 1 gives every attention and"
        " MLP matrix the size of its last update; the other weights stay as they were at that step."
    )
    return Table("Early direction, late size", columns, rows, note)


def _recovery(tried: Sequence[Variant], each: Variant) -> dict[str, float | None]:
    start, end = tried[0], tried[1]
    return {
        "accuracy": recovered(each.accuracy, start.accuracy, end.accuracy),
        "reverse_kl": recovered(each.reverse_kl, start.reverse_kl, end.reverse_kl),
    }


def _panels(analysis: Analysis) -> list[Panel]:
    geometry = analysis.geometry
    steps = [float(step) for step in geometry.steps]
    means = [geometry.mean_spectrum(i) for i in range(len(steps))]
    curves = [geometry.mean_subspace_cosines(i) for i in range(len(steps))]
    settled = [
        Curve("whole update", steps, geometry.cosine_to_last),
        Curve("random walk", steps, geometry.random_walk_cosine),
    ]
    for k in (1, 20):
        ys = [curve[k - 1] if k <= len(curve) else math.nan for curve in curves]
        settled.append(Curve(f"top {k}", steps, ys))
    panels = [
        Panel("Cosine with the last update", "step", "cosine", settled),
        Panel("Effective rank", "step", "", [Curve("mean", steps, [mean["effective_rank"] for mean in means])]),
        Panel("s1 / Frobenius", "step", "", [Curve("mean", steps, [mean["spectral_share"] for mean in means])]),
    ]
    scaled = [each for each in analysis.variants if each.scale is not None and not each.scales_all]
    xs = [each.scale for each in scaled if each.scale is not None]
    measured = {"Accuracy": [each.accuracy for each in scaled], "Reverse KL": [each.reverse_kl for each in scaled]}
    for title, values in measured.items():
        known = [value for value in values if value is not None]
        if scaled and len(known) == len(scaled):
            panels.append(Panel(f"{title} of the early direction", "scale", "", [Curve(title, xs, known)]))
    return panels


def _notes(analysis: Analysis) -> list[str]:
    geometry, notes = analysis.geometry, []
    if narrow := [dtype for dtype in analysis.dtypes if dtype in ("bfloat16", "float16")]:
        notes.append(
            f"Weights are stored in {', '.join(narrow)}: the noise of rounding has full rank, and updates smaller than"
            " it are lost. UpdateRecorder rounds the updates instead."
        )
    if analysis.is_low_rank:
        notes.append("LoRA: the rank of an update is at most that of its adapter; compare effective ranks with that.")
    if max(min(each.shape) for each in geometry.averaged) <= 100:
        notes.append("All matrices have at most 100 singular values, so that the top 1 % is the first one alone.")
    if len(geometry.steps) < SHORT:
        notes.append(f"{len(geometry.steps)} points: their first two components hold most of the variance in any case.")
    if geometry.steps[0] == 1:
        notes.append(
            "The first step of Adam moves every weight by the same amount, whatever its gradient: mostly noise."
        )
    if not analysis.variants:
        notes.append("Left out: norm scaling and embeddings swapped back, which need answers. Set --config for them.")
    return notes


def _shown(num_points: int) -> list[int]:
    """Indices of some points, the first and the last among them, and more of the early ones."""
    count = min(num_points, SHOWN_POINTS)
    return sorted({round((num_points - 1) * (i / max(1, count - 1)) ** 2) for i in range(count)})


def _step(geometry: RunGeometry, point: int) -> tuple[str, str]:
    """The step, and which share of training it is."""
    return str(geometry.steps[point]), f"{geometry.steps[point] / geometry.steps[-1]:.0%}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
