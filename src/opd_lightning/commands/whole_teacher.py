"""A quantised teacher in full, beside it, where there is memory for both."""

from __future__ import annotations

import torch

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.backends.hf.teacher_memory import whole_bytes
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.interfaces import Teacher
from opd_lightning.planning.machine import free_memory_of

_ROOM = 1.1  # times the weights: a micro-batch is scored beside them


def load_whole_teacher(pair: Pair) -> Teacher | str:
    """The teacher of a loaded pair with weights that are not quantised: on its device, else on the CPU.

    Args:
        pair: Its teacher is a quantised `HFTeacher`.

    Returns:
        The teacher, loaded, or why it was not.
    """
    assert isinstance(pair.teacher, HFTeacher) and pair.model is not None, "a loaded pair with a quantised teacher"
    whole, seen = pair.teacher.in_full(), []
    needed = 1e-9 * whole_bytes(whole)
    for device in dict.fromkeys((pair.device, torch.device("cpu"))):
        free = free_memory_of(device)
        if free is None or _ROOM * needed <= free:
            whole.setup(pair.student, pair.model, device)
            return whole
        seen.append(f"{free:.3g} GB are free on {device}")
    return (
        f"What quantisation changes of the teacher: in full it takes {needed:.3g} GB, and {', '.join(seen)}. Measure it"
        " on a machine that has the memory."
    )
