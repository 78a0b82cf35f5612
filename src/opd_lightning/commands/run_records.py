"""What a run leaves behind about itself: `config.yaml` in its own folder, and its settings in every logger."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from opd_lightning.commands.parser import class_at
from opd_lightning.interfaces.addresses import leave_secrets_out
from opd_lightning.training.output_paths import run_folder


class RunRecords(SaveConfigCallback):
    """Writes `config.yaml` beside the run's checkpoints and gives its settings to the loggers as hyper-parameters.

    Passwords and keys are in neither: a placeholder says which setting to fill in before the file is used again.

    Lightning's own writes into `save_dir` when the logger is not one of its two file loggers: with W&B or MLflow that
    is one place for all runs.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_unset=False)
        settings = yaml.safe_load(text)
        if (shown := leave_secrets_out(settings)) != settings:
            text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
        (folder / self.config_filename).write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams(flat(shown))


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists of classes are numbered, other lists stay whole."""
    if isinstance(settings, list) and any(isinstance(part, dict) for part in settings):
        settings = {str(number): part for number, part in enumerate(settings)}
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    dot = f"{prefix}." if prefix else ""
    return {name: value for key, part in settings.items() for name, value in flat(part, f"{dot}{key}").items()}


def keep_logs_in_root(trainer: Any) -> None:
    """Have loggers write below `default_root_dir` unless they were told where.

    W&B's `save_dir` is the current folder by default and MLflow's `./mlruns` there; Lightning leaves them so.

    Args:
        trainer: The settings of the trainer, as parsed; changed in place.
    """
    root = trainer.get("default_root_dir")
    loggers = trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if root is None or not hasattr(logger, "get") or not logger.get("init_args"):
            continue
        save_dir = inspect.signature(class_at(logger.class_path)).parameters.get("save_dir")
        if save_dir is not None and isinstance(save_dir.default, str) and logger.init_args.save_dir == save_dir.default:
            logger.init_args.save_dir = str(Path(root, save_dir.default))
