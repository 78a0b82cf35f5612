"""What `TokenRecorder` costs in the quickstart: its share of the processor time, and bytes per token on the disk.

python benchmarks/token_records.py FOLDER writes the run there, and its results into benchmarks/results. Default
settings of the callback; processor time, validation and everything else of the run included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyarrow.parquet

from opd_lightning import TokenRecorder
from opd_lightning.commands.cli import main
from opd_lightning.reports.token_records import steps_of

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
RESULTS = Path(__file__).parent / "results" / "token_records_cpu-2core.json"


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
        result = {
            "machine": "2 shared x86-64 cores, 1 thread",
            "settings": {name: getattr(self, name) for name in ("every_n_steps", "num_rollouts", "num_fixed", "top_k")},
            "steps": trainer.global_step,
            "seconds": self.spent,
            "seconds_of_training": whole,
            "share": self.spent / whole,
            "seconds_of_each_record": self.per_record,
            "tokens": num_tokens,
            "bytes_per_token": self.num_bytes / num_tokens,
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{result['share']:.2%} of the processor time, {result['bytes_per_token']:.0f} bytes per token")

    def _add(self, seconds):
        self.spent += seconds
        if seconds > 1e-3:
            self.per_record.append(seconds)


if __name__ == "__main__":
    recorder = "--trainer.callbacks+=token_records.TimedRecorder"
    main(["fit", "--config", str(CONFIG), "--trainer.default_root_dir", sys.argv[1], recorder])
