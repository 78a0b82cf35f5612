"""How much memory was held at most between two moments."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5): the peak of resident memory starts anew at what is held now


class PeakMemory:
    """Most bytes held since `restart`: of the GPU by torch's tensors, elsewhere by the whole process (Linux).

    Args:
        device: Whose memory.

    Raises:
        ValueError: It cannot be known here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            self.restart()
        except OSError as error:
            raise ValueError(
                f"model.measure_memory: the peak memory of a process is known on Linux only ({error}). Leave it out."
            ) from error

    def restart(self) -> None:
        """Count from here. On a GPU `torch.cuda.max_memory_allocated` starts anew too, for everybody."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _RESET.write_text(_RESET_PEAK)

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
