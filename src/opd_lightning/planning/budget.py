"""What one device holds during the parts of a step, from what a rehearsal found: shards, engines, GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd_lightning.planning.case import Case, Phase, Rehearsal

COPIES = "EffOPD's copies"
WHOLE = "whole student to generate with"
SHARDED = ("student weights", "gradients", "optimiser state", COPIES)
ROOM = 0.95  # of the memory that may be planned for: allocators and contexts take some
_ENTRIES_PER_BLOCK = 2**24  # of the loss on a GPU
_NUM_BUFFERS = 8  # of such a block
_GIGA = 1e9


@dataclass(frozen=True)
class Layout:
    """The device and what shares it.

    Attributes:
        is_gpu: Whether it is one.
        num_devices: Which run the step together.
        is_sharded: Whether the student's weights, gradients and moments are cut over them (FSDP2).
        engine_awake_gb: Of an engine on the same device, while it generates.
        engine_asleep_gb: Of the same, while it does not.
    """

    is_gpu: bool
    num_devices: int = 1
    is_sharded: bool = False
    engine_awake_gb: float = 0.0
    engine_asleep_gb: float = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether this device has a part of the student only."""
        return self.is_sharded and self.num_devices > 1


@dataclass(frozen=True)
class Budget:
    """What a step takes on one device.

    Attributes:
        phases: Its parts.
        memory_gb: What the device has.
    """

    phases: Sequence[Phase]
    memory_gb: float

    @property
    def worst(self) -> Phase:
        """When most is held."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak_gb(self) -> float:
        """Most gigabytes held."""
        return self.worst.total / _GIGA

    @property
    def fits(self) -> bool:
        """Whether that leaves a little of what the device has."""
        return self.peak_gb <= ROOM * self.memory_gb

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(phase.seconds for phase in self.phases)


def budget(case: Case, found: Rehearsal, layout: Layout, memory_gb: float) -> Budget:
    """What one device holds, part by part."""
    return Budget([_on_device(phase, case, found, layout) for phase in _all_phases(found, layout)], memory_gb)


def _all_phases(found: Rehearsal, layout: Layout) -> list[Phase]:
    """Those rehearsed, a vLLM's generation beside what is held between two parts, and EffOPD's search: two copies."""
    phases = list(found.phases)
    if layout.engine_awake_gb:
        waiting = {part: size for part, size in phases[-1].peak.items() if part not in ("gradients", "activations")}
        phases.insert(0, Phase("generate", waiting, 0.0, 0.0, 0.0, 0.0))
    for phase in phases[:]:
        if phase.name == "generate" and COPIES in phase.peak:
            phases.append(Phase("search", {**phase.peak, COPIES: 2 * phase.peak[COPIES]}, 0.0, 0.0, 0.0, 0.0))
    return phases


def _on_device(phase: Phase, case: Case, found: Rehearsal, layout: Layout) -> Phase:
    peak = dict(phase.peak)
    if found.saved_bytes:
        peak["teacher weights"] -= found.saved_bytes
    if layout.is_cut:
        _cut(peak, phase.name, case, found, layout.num_devices)
        if phase.name == "optimizer":
            phase = replace(phase, seconds=phase.seconds / layout.num_devices)
    scores_all_at_once = found.resting_bytes is not None or (layout.is_cut and found.shared_teacher is not None)
    if scores_all_at_once and phase.name in ("teacher", "student"):
        peak["teacher scores"] = found.scores_bytes
    if layout.is_gpu:
        if found.resting_bytes is not None and phase.name != "teacher":
            peak["teacher weights"] = found.resting_bytes
        if phase.name == "student":
            entries = min(_ENTRIES_PER_BLOCK, case.objective.chunk_tokens * case.student.tokenizer.vocab_size)
            peak["loss"] = peak.get("loss", 0) + 4 * _NUM_BUFFERS * entries
        if phase.name == "optimizer" and not found.is_fused:  # torch steps all weights at once there, over a copy
            share = layout.num_devices if layout.is_sharded else 1
            peak["activations"] = peak.get("activations", 0) + found.trained_bytes // share
    engine_gb = layout.engine_awake_gb if phase.name in ("generate", "search") else layout.engine_asleep_gb
    if engine_gb:
        peak["engine"] = int(_GIGA * engine_gb)
    return replace(phase, peak={part: size for part, size in peak.items() if size})


def _cut(peak: dict[str, int], name: str, case: Case, found: Rehearsal, num_devices: int) -> None:
    """Leave one process its share of what all have together, and what is whole on it for a while."""
    whole_student = peak.get("student weights", 0)
    for part in SHARDED:
        if part in peak:
            peak[part] = -(-peak[part] // num_devices)
    if name == "student":
        peak["gradients"] = peak.get("gradients", 0) + found.gathered_gradient_bytes
    if name in ("student", "search") or (name == "generate" and not case.engine_rows):
        peak["gathered weights"] = found.gathered_bytes
    if case.engine_rows:
        peak[WHOLE] = whole_student
    if (teacher := found.shared_teacher) is not None and "teacher weights" in peak:
        peak["teacher weights"] = -(-teacher.body_bytes // num_devices) + teacher.head_bytes
        if name == "teacher":
            peak["gathered weights"] = teacher.gathered_bytes
