"""A quantised teacher in full, beside it, where there is memory for both."""

from __future__ import annotations

import torch

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.backends.hf.teacher_memory import whole_bytes
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.interfaces import Teacher
from opd_lightning.planning.machine import free_memory_of

_CPU = torch.device("cpu")
_ROOM = 1.1  # times the weights: a micro-batch is scored beside them


def load_whole_teacher(pair: Pair) -> Teacher | str:
    """The teacher of a loaded pair with weights that are not quantised: on its device, else on the CPU.

    Args:
        pair: Its teacher is a quantised `HFTeacher`.

    Returns:
        The teacher, loaded, or why it was not.
    """
    assert isinstance(pair.teacher, HFTeacher) and pair.model is not None, "a loaded pair with a quantised teacher"
    whole = pair.teacher.in_full()
    needed = 1e-9 * whole_bytes(whole)
    free = {device: free_memory_of(device) for device in dict.fromkeys((pair.device, _CPU))}
    lacking = {device: size for device, size in free.items() if size is not None and size < _ROOM * needed}
    if _CPU not in lacking:  # weights are read into its memory, wherever they go from there
        whole.setup(pair.student, pair.model, _CPU if lacking else pair.device)
        return whole
    seen = ", ".join(f"{size:.3g} GB are free on {device}" for device, size in lacking.items())
    return (
        f"What quantisation changes of the teacher: in full it takes {needed:.3g} GB, and {seen}. Measure it"
        " on a machine that has the memory."
    )
