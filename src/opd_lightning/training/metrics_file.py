"""`WholeCSVLogger`: `metrics.csv` loses no row to a full disk or a kill. Works in any Lightning project."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from opd_lightning.whole_files import written_whole


class WholeCSVLogger(CSVLogger):
    """`CSVLogger` that writes every row at once, and the file anew beside its place when a metric appears.

    Lightning's own empties the file before it writes it with the new column: what stops it there loses all rows. Here
    the old file stays until the new one is complete. A row goes to the end of the file in one piece, and one that a
    full disk cut short is taken back. Files elsewhere (``s3://...``) are left to Lightning.

    Args:
        save_dir: Folder of all runs.
        name: Folder in it; None for none.
        version: Folder in that, for this run alone; the next number by default.
        prefix: Put before the names of metrics.
        flush_logs_every_n_steps: Rows of so many steps may be lost by a kill.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 1,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)

    @property
    @override
    def experiment(self) -> Any:
        """What writes the file, on the first process; on others Lightning's dummy, which writes nothing."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0 and "://" not in self.save_dir:
            self._experiment = _WholeFile(self.log_dir)
        return super().experiment


class _WholeFile(ExperimentWriter):
    @override
    def save(self) -> None:
        if not self.metrics:
            return
        path, names = Path(self.metrics_file_path), sorted({*self.metrics_keys}.union(*self.metrics))
        if names == self.metrics_keys and path.exists():
            append_whole(path, _as_text(names, self.metrics))
        else:
            earlier = _read_rows(path) if path.exists() else []
            with written_whole(path) as file:
                file.write(_as_text(names, [*earlier, *self.metrics], with_header=True))
        self.metrics_keys, self.metrics = names, []  # now, so that a save that failed can be tried again


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _as_text(names: list[str], rows: list[dict[str, Any]], *, with_header: bool = False) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    if with_header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def append_whole(path: Path, content: bytes) -> None:
    """Add to the end of a file, which is made if need be, or leave it as it is.

    Raises:
        OSError: The disk is full, say; nothing of the content is in the file then.
    """
    length = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError:
        if path.exists():
            os.truncate(path, length)  # half a row would spoil the next one
        raise
