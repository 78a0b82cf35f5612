"""`opd-lightning analyze`: what the weight updates of a finished run look like."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import rich
import torch

from opd_lightning.commands.analysis_report import Analysis, as_json, make_report
from opd_lightning.commands.norm_scaling import Variant, try_variants, variants
from opd_lightning.commands.update_geometry import measure
from opd_lightning.reports.files import write_json, write_page
from opd_lightning.reports.screen import show
from opd_lightning.training.output_paths import check_folder
from opd_lightning.training.run_points import PointsFrom, find_updates
from opd_lightning.training.weight_updates import WeightUpdates

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def analyze(
    run: str,
    run_config: str | None = None,
    output: str | None = None,
    start: str | None = None,
    matrices: str = "",
    points_from: PointsFrom = "any",
    device: str = "cpu",
    early: float = 0.1,
    scales: Sequence[float] = SCALES,
    num_problems: int | None = None,
) -> None:
    """Measure the weight updates of a run: spectra, effective rank, when directions settle, shape of the trajectory.

    Args:
        run: Folder of the run, with checkpoints, exported folders or records of UpdateRecorder in it.
        run_config: The run's config.yaml (--config for short): also answer its held-out problems with the early update
            at several sizes, and with the embeddings of the start; null leaves these two out.
        output: Folder for analysis.json and analysis.html; null is `analysis` in the folder of the run.
        start: The weights before the first step (a model folder, a checkpoint, or a hub id that has been downloaded);
            null asks the run's files.
        matrices: Only matrices whose names this regular expression is found in.
        points_from: Which files of the run; any takes the kind of which there are most.
        device: Where singular values are computed, for example cuda.
        early: Share of training after which the update is rescaled, and whose direction is reported.
        scales: Sizes of the early update in those of the last.
        num_problems: Held-out problems answered; null takes as many as the config says.
    """
    folder = Path(output if output is not None else Path(run, "analysis")).expanduser()
    _check(run, early, scales, num_problems)
    where = _device(device)
    updates = find_updates(run, start, matrices, points_from)
    check_folder("output", folder)
    if run_config is not None and not run_config.startswith("@") and not Path(run_config).is_file():
        raise ValueError(
            f"config: there is no file {run_config!r}. A run's own is config.yaml, beside its checkpoints."
        )
    point = _point_at_share(updates, early)
    tried = _tried(run_config, updates, point, scales, num_problems) if run_config is not None else []
    count = iter(range(1, len(updates.matrices) + 1))
    geometry = measure(updates, where, lambda name: _say(f"{next(count)} of {len(updates.matrices)}: {name}"))
    analysis = Analysis(
        run=run,
        start=None if updates.start is None else str(updates.start.stored.path),
        points=[str(each.stored.path) for each in updates.points],
        dtypes=_dtypes(updates),
        is_low_rank=bool(updates.points[-1].factors),
        early=point,
        geometry=geometry,
        variants=tried,
    )
    report = make_report(analysis)
    show(
        replace(report, tables=[each for each in report.tables if not each.title.startswith("Every")]),
        rich.get_console(),
    )
    write_json(folder / "analysis.json", as_json(analysis))
    write_page(folder / "analysis.html", report)
    print(f"\n{folder / 'analysis.json'}\n{folder / 'analysis.html'}")


def _check(run: str, early: float, scales: Sequence[float], num_problems: int | None) -> None:
    if not 0 < early < 1:
        raise ValueError(f"early: expected a share of training between 0 and 1, got {early}.")
    if any(not 0 <= scale < 100 for scale in scales):
        raise ValueError(f"scales: expected sizes from 0 on, where 1 is that of the last update; got {list(scales)}.")
    if num_problems is not None and num_problems < 1:
        raise ValueError(f"num_problems: expected at least 1 or null, got {num_problems}.")


def _tried(
    config: str, updates: WeightUpdates, point: int, scales: Sequence[float], num_problems: int | None
) -> list[Variant]:
    everything = WeightUpdates(updates.start, updates.points)  # whichever matrices are measured
    return try_variants(config, everything, variants(everything, point, scales), num_problems, _say)


def _say(words: str) -> None:
    print(f"analyze: {words}", file=sys.stderr)


def _dtypes(updates: WeightUpdates) -> list[str]:
    """In which weights are stored; none for updates, whose rounding is small beside themselves."""
    weights = [point for point in updates.points if not point.holds_updates and not point.factors]
    return sorted({str(each.dtype_of(name)).removeprefix("torch.") for each in weights for name in updates.matrices})


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # how torch says that it, or its float64, is not here
        raise ValueError(
            f"device: expected a device of this machine that knows float64, such as cpu or cuda, got {name!r}."
        ) from error
    return device


def _point_at_share(updates: WeightUpdates, early: float) -> int:
    """The point next to this share of training, which is not the last."""
    wanted = early * updates.steps[-1]
    return min(range(len(updates.points) - 1), key=lambda i: abs(updates.steps[i] - wanted))
