"""What is shown of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.planning import Budget, Case, Hardware, Layout, Remedy, TeacherElsewhere
from opd_lightning.reports.contents import Report, Statement, Table, number

_OFFSET = "An allocator may keep a quarter more than is in use, and a process takes memory before it has a model."


def make_report(
    case: Case, planned: Budget, machine: Hardware, layout: Layout, useful: Sequence[Remedy] = ()
) -> Report:
    """Memory and seconds by part of the step, and what would make it smaller."""
    rollouts = f"{case.num_rollouts} rollouts of {case.prompt_tokens} + {case.response_tokens} tokens"
    batches = f"in {case.num_micro_batches} micro-batches of {case.rows}"
    return Report(
        title=f"plan: {one_line(case, planned)} on {machine.name}",
        subtitle=f"A step: {rollouts}, {batches}" + (" on each device" if layout.num_devices > 1 else ""),
        statements=[_verdict(planned, useful)],
        tables=[_memory(planned), _seconds(planned), *([_remedies(useful)] if useful else [])],
        notes=_notes(case, machine, layout),
    )


def one_line(case: Case, planned: Budget) -> str:
    """The peak of a step, what it is made of, and what is missing."""
    worst = planned.worst
    parts = sorted(worst.peak.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{part} {_amount(size)}" for part, size in parts if size >= 0.02 * worst.total)
    teacher = case.teacher
    missing = teacher.uncounted if isinstance(teacher, TeacherElsewhere) else None
    return f"about {_amount(worst.total)} of {planned.memory_gb:.3g} GB at the peak, {worst.name} ({shown})" + (
        f" and {missing}, which is not counted," if missing else ""
    )


def _memory(planned: Budget) -> Table:
    parts = list(dict.fromkeys(part for phase in planned.phases for part in phase.peak))
    unit, size_of = ("GB", 1e9) if planned.worst.total >= 1e9 else ("MB", 1e6)
    shown = [
        part
        for part in parts
        if any(phase.peak.get(part, 0) >= 0.001 * planned.worst.total for phase in planned.phases)
    ]
    rows = [[part, *(f"{phase.peak.get(part, 0) / size_of:,.1f}" for phase in planned.phases)] for part in shown]
    rows.append(["together", *(f"{phase.total / size_of:,.1f}" for phase in planned.phases)])
    names = [phase.name for phase in planned.phases]
    return Table(f"Memory at the worst moment of each part of a step, {unit}", ["", *names], rows)


def _seconds(planned: Budget) -> Table:
    rows = [
        [phase.name, number(phase.seconds), number(1e-12 * phase.flops), number(1e-9 * phase.bytes)]
        for phase in planned.phases
    ]
    rows.append(["together", number(planned.seconds), "", ""])
    return Table("Seconds of a step", ["", "seconds", "TFLOP", "GB moved"], rows)


def _remedies(useful: Sequence[Remedy]) -> Table:
    rows = [
        [each.words, f"{each.budget.peak_gb:.3g}", "fits" if each.budget.fits else "does not fit"] for each in useful
    ]
    return Table("What would make it smaller", ["setting", "peak GB", ""], rows)


def _verdict(planned: Budget, useful: Sequence[Remedy]) -> Statement:
    if planned.fits:
        return Statement("It fits.", [("because", "at least 5 % of the memory stay free")])
    too_large = [phase.name for phase in planned.phases if Budget([phase], planned.memory_gb).fits is False]
    fitting = [each for each in useful if each.budget.fits]
    remedy = f"It would with {fitting[0].words}." if fitting else "No setting that was tried makes it fit: several"
    remedy += "" if fitting else " devices (--devices), a smaller model or shorter answers would."
    return Statement(f"It does not fit: {', '.join(too_large)}.", [("remedy", remedy)])


def _notes(case: Case, machine: Hardware, layout: Layout) -> list[str]:
    if machine.is_gpu:
        notes = [f"Computed, not measured: peaks of {machine.name} from {machine.source}; products at 60 % of them."]
    else:
        notes = [f"Speeds: {machine.source}."]
    if layout.is_cut:
        words = f"Computed for FSDP2 over {layout.num_devices} devices"
        if isinstance(case.teacher, HFTeacher):
            how = "cut up over them, all but its head" if case.teacher.is_shared else "whole on each"
            words += f"; the teacher is {how}"
        if case.engine_rows:
            words += "; each has a whole student beside its share, to generate with"
        notes.append(f"{words}.")
    if layout.engine_awake_gb:
        notes.append("vLLM's seconds are not planned; its memory is gpu_memory_utilization.")
    return [*notes, _OFFSET]


def _amount(size: float) -> str:
    return f"{1e-9 * size:.3g} GB" if size >= 1e9 else f"{1e-6 * size:.3g} MB"
