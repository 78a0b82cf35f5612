"""Tables and pictures of phenomenology.py: written between the marks of docs/phenomenology.md, and beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phenomenology_arms import PHENOMENA, SEEDS, Arm

DOCS = Path(__file__).parents[1] / "docs"
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
Run = dict[str, Any]


def accuracy_before(run: Run) -> float:
    """Held out."""
    return run["evaluations"][0]["accuracy"]


def accuracy_after(run: Run) -> float:
    """Held out."""
    return run["evaluations"][-1]["accuracy"]


def imitated(run: Run) -> float | None:
    """Accuracy after the cold start, before distillation."""
    return accuracy_before(run) if "imitation" in run else None


def gap_recovery(run: Run) -> float | None:
    """(after - before) / (teacher - before); before the cold start, if there was one. None where there is no gap."""
    before = run["imitation"]["evaluations"][0]["accuracy"] if "imitation" in run else accuracy_before(run)
    gap = run["teacher_accuracy"] - before
    return (accuracy_after(run) - before) / gap if gap > 0 else None


def mean_of_last(run: Run, name: str, num_steps: int = 5) -> float:
    """Mean of a metric over the last steps."""
    values = [step[name] for step in run["steps"][-num_steps:]]
    return sum(values) / len(values)


COLUMNS: dict[str, tuple[str, Callable[[Run], float | None]]] = {  # heading, value
    "teacher": ("teacher's accuracy", lambda run: run["teacher_accuracy"]),
    "before": ("before", accuracy_before),
    "imitated": ("after imitation", imitated),
    "after": ("after", accuracy_after),
    "recovery": ("gap recovered", gap_recovery),
    "overlap_first": ("overlap ratio, first step", lambda run: run["steps"][0]["overlap_ratio"]),
    "overlap_last": ("last 5 steps", lambda run: mean_of_last(run, "overlap_ratio")),
    "mass_student": ("least overlap mass, student", lambda run: min(s["overlap_mass_student"] for s in run["steps"])),
    "mass_teacher": ("teacher", lambda run: min(s["overlap_mass_teacher"] for s in run["steps"])),
    "reverse_kl": ("reverse KL, last 5 steps", lambda run: mean_of_last(run, "reverse_kl")),
    "entropy_peak": ("highest student entropy", lambda run: max(s["student_entropy"] for s in run["steps"])),
    "grad_peak": ("highest gradient norm", lambda run: max(s["grad_norm"] for s in run["steps"])),
    "length": ("answer, tokens", lambda run: run["evaluations"][-1]["length"]),
    "seconds": ("processor seconds", lambda run: run["seconds"]),
    "question": ("after, under the other template", lambda run: run["evaluations"][-1].get("accuracy_question")),
}
SHOWN: dict[str, tuple[str, ...]] = {
    "compatibility": ("teacher", "before", "after", "overlap_first", "overlap_last", "reverse_kl"),
    "new_capability": ("teacher", "before", "after", "recovery", "overlap_first", "overlap_last"),
    "overlap": ("before", "after", "overlap_first", "overlap_last", "mass_student", "mass_teacher"),
    "support": ("before", "after", "overlap_first", "overlap_last", "reverse_kl"),
    "reverse": ("teacher", "before", "after", "overlap_first", "overlap_last"),
    "size_of_support": ("before", "after", "reverse_kl", "entropy_peak", "grad_peak"),
    "cold_start": ("teacher", "imitated", "after", "overlap_first", "overlap_last", "length"),
    "template": ("teacher", "before", "after", "question", "recovery", "overlap_first", "overlap_last"),
    "horizon": ("before", "after", "recovery", "reverse_kl", "seconds"),
}


def runs_of(results: Sequence[Run], arm: Arm) -> list[Run]:
    """The runs of an arm with the seeds that count."""
    return sorted((r for r in results if r["arm"] == arm.name and r["seed"] in SEEDS), key=lambda run: run["seed"])


def cell(runs: Sequence[Run], value: Callable[[Run], float | None]) -> str:
    """Mean, and in brackets least and most."""
    values = [found for run in runs if (found := value(run)) is not None]
    if not values:
        return "-"
    digits = 2 if max(map(abs, values)) >= 10 else 3
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(results: Sequence[Run], phenomenon: str) -> str:
    """One phenomenon: a row per arm that has runs."""
    columns = [COLUMNS[name] for name in SHOWN[phenomenon]]
    rows = [
        "| arm | seeds | " + " | ".join(heading for heading, _ in columns) + " |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for label, arm in PHENOMENA[phenomenon].items():
        if runs := runs_of(results, arm):
            cells = [cell(runs, value) for _, value in columns]
            rows.append(f"| {label} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def with_tables(page: str, results: Sequence[Run]) -> str:
    """The page with the tables between its marks `<!-- table NAME -->` and `<!-- end -->` written anew."""
    for phenomenon in PHENOMENA:
        mark, end = f"<!-- table {phenomenon} -->\n", "<!-- end -->"
        if mark in page:
            start = page.index(mark) + len(mark)
            page = page[:start] + table(results, phenomenon) + "\n" + page[page.index(end, start) :]
    return page


def write_report(results: Sequence[Run], docs: Path = DOCS) -> None:
    """Print the tables, write them into the page if it is there, and draw the pictures."""
    for phenomenon in PHENOMENA:
        print(f"\n{phenomenon}\n\n{table(results, phenomenon)}")
    page = docs / "phenomenology.md"
    if page.exists():
        page.write_text(with_tables(page.read_text(), results))
    draw_accuracies(results, docs / "phenomenology_accuracy.svg")
    draw_overlaps(results, docs / "phenomenology_overlap.svg")


def draw_accuracies(results: Sequence[Run], path: Path) -> None:
    """One panel per phenomenon, one row per arm: before, after (a dot per seed), and the teacher."""
    with panels(path) as (figure, axes):
        for (phenomenon, arms), axis in zip(PHENOMENA.items(), axes, strict=True):
            for row, arm in enumerate(arms.values()):
                runs = runs_of(results, arm)
                axis.plot([accuracy_before(run) for run in runs], [row] * len(runs), "|", color="black", markersize=14)
                axis.plot([run["teacher_accuracy"] for run in runs], [row] * len(runs), "x", color="tab:red")
                axis.plot([accuracy_after(run) for run in runs], [row] * len(runs), "o", color="tab:blue", alpha=0.6)
            axis.set(title=phenomenon.replace("_", " "), xlabel="held-out accuracy", xlim=(-0.02, 1.02))
            axis.set_yticks(range(len(arms)), list(arms))
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.grid(alpha=0.3)
        figure.suptitle("before distillation (line), after (a dot per seed), teacher (cross)")


def draw_overlaps(results: Sequence[Run], path: Path) -> None:
    """One panel per phenomenon, one line per run: the overlap ratio of the training step's answers."""
    with panels(path) as (_, axes):
        for (phenomenon, arms), axis in zip(PHENOMENA.items(), axes, strict=True):
            for (name, arm), color in zip(arms.items(), COLORS, strict=False):
                for number, run in enumerate(runs_of(results, arm)):
                    ys = [facts["overlap_ratio"] for facts in run["steps"]]
                    label = None if number else name
                    axis.plot(range(1, len(ys) + 1), ys, color=color, alpha=0.7, linewidth=1.1, label=label)
            axis.set(title=phenomenon.replace("_", " "), xlabel="optimiser steps", ylabel="overlap ratio of the top 16")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=6)


@contextmanager
def panels(path: Path) -> Iterator[Any]:
    """An axis for each phenomenon, and the figure, which is written afterwards; no setting outlives it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "opd-lightning", "font.size": 8}):
        figure = Figure(figsize=(13, 9), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(3, 3).flat
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
