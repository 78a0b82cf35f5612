"""What `TokenRecorder` costs in the quickstart: its share of the processor time, and bytes per token on the disk.

python benchmarks/token_records.py FOLDER writes the run there. Default settings of the callback.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pyarrow.parquet

from opd_lightning import TokenRecorder
from opd_lightning.commands.cli import main
from opd_lightning.reports.token_records import steps_of

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class TimedRecorder(TokenRecorder):
    """Adds up its own processor time, and that of the whole training."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.spent, self.per_record, self.started = 0.0, [], time.process_time()

    def on_train_batch_start(self, *arguments):
        before = time.process_time()
        super().on_train_batch_start(*arguments)
        self._add(time.process_time() - before)

    def on_train_end(self, trainer, pl_module):
        before = time.process_time()
        super().on_train_end(trainer, pl_module)
        self._add(time.process_time() - before)
        whole = time.process_time() - self.started
        tables = [pyarrow.parquet.read_table(path) for path in steps_of(self.folder).values()]
        num_tokens = sum(sum(table["num_tokens"].to_pylist()) for table in tables)
        print(
            f"{len(tables)} records of {num_tokens} tokens in {trainer.global_step} steps: {self.spent:.2f} s of"
            f" {whole:.1f} s of processor time ({self.spent / whole:.2%}); the first record {self.per_record[0]:.2f} s,"
            f" the others {sum(self.per_record[1:]) / len(self.per_record[1:]):.3f} s each;"
            f" {self.num_bytes / num_tokens:.0f} bytes per token on the disk"
        )

    def _add(self, seconds):
        self.spent += seconds
        if seconds > 1e-3:
            self.per_record.append(seconds)


if __name__ == "__main__":
    recorder = "--trainer.callbacks+=token_records.TimedRecorder"
    main(["fit", "--config", str(CONFIG), "--trainer.default_root_dir", sys.argv[1], recorder])
