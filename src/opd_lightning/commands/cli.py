"""The door: `opd-lightning fit|validate|test|predict --config x.yaml`, and the commands that need no trainer."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import override

from opd_lightning.callbacks.answers import AnswersWriter
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.callbacks.start_validation import StartValidation
from opd_lightning.commands.parser import PROGRAM, OneLineParser, explain
from opd_lightning.training.checkpoints import WholeCheckpoints, check_checkpoint_file, export, read_checkpoint
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.module import OPDModule

PLAIN_COMMANDS: dict[str, Callable[..., None]] = {"export": export}
COMMANDS = ("fit", "validate", "test", "predict", *PLAIN_COMMANDS)
DESCRIPTION = f"On-policy distillation of language models. Commands without a trainer: {', '.join(PLAIN_COMMANDS)}."
ROOMS_WITH_SHORT_NAMES = (  # `HFStudent` works in YAML for the whole path, but only once its room was imported
    "backends.hf",
    "callbacks.effopd",
    "callbacks.effopd_scores",
    "callbacks.samples",
    "callbacks.held_out_loss",
    "objectives",
    "rollouts.one_step_ahead",
    "rollouts.plain_engine",
    "training.schedules",
    "selection",
    "tasks",
    "teachers",
)


def _as_data_seed(seed_everything: bool | int) -> int:
    if isinstance(seed_everything, bool):
        raise ValueError(
            f"seed_everything: expected an integer, since rollouts are a function of it; got {seed_everything}."
        )
    return seed_everything


class OPDCLI(LightningCLI):
    """LightningCLI with one seed for everything, no abbreviations, and a configuration that wins over checkpoints."""

    def __init__(self, args: list[str] | None = None) -> None:
        for room in ROOMS_WITH_SHORT_NAMES:
            import_module(f"opd_lightning.{room}")
        super().__init__(
            OPDModule,
            OPDDataModule,
            seed_everything_default=0,
            trainer_defaults={
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,  # StartValidation runs the whole one
                "callbacks": [StartValidation(), AnswersWriter(), RescueCheckpoint()],
            },
            parser_class=OneLineParser,
            parser_kwargs={"allow_abbrev": False, "description": DESCRIPTION},
            auto_configure_optimizers=False,  # `model.optimizer` is the place
            save_config_kwargs={"overwrite": True},  # a resumed run may log into the same folder
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_as_data_seed)
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch; null leaves the choice to torch. Tiny models are fastest with 1.",
        )

    @override
    def before_instantiate_classes(self) -> None:
        if num_threads := self.config[self.config.subcommand].num_threads:
            torch.set_num_threads(num_threads)

    @override
    def _parse_ckpt_path(self) -> None:
        # The original lets hyper-parameters stored in a checkpoint override the file and the flags the user just gave.
        ckpt_path = self.config[self.config.subcommand].get("ckpt_path")
        if ckpt_path and ckpt_path not in ("best", "last", "hpc", "registry") and "://" not in ckpt_path:
            check_checkpoint_file(ckpt_path)
            if Path(ckpt_path).is_file():  # sharded ones are folders
                read_checkpoint(ckpt_path)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        _check_trainer(config)
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpoints()]
        if config.get("logger") is None:
            root = config.get("default_root_dir") or os.getcwd()
            tensorboard = TensorBoardLogger(root)
            kwargs["logger"] = [tensorboard, CSVLogger(root, version=tensorboard.version, flush_logs_every_n_steps=1)]
        return super().instantiate_trainer(**kwargs)


def _check_trainer(config: dict[str, Any]) -> None:
    """Say what to use instead of what Lightning would do in automatic optimisation."""
    if config.get("gradient_clip_val"):
        raise ValueError("trainer.gradient_clip_val: OPDModule clips by itself. Set model.gradient_clip_norm instead.")
    if config.get("accumulate_grad_batches", 1) != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches: OPDModule cuts a step into micro-batches of"
            " model.max_tokens_per_micro_batch tokens by itself. For more prompts per step raise data.prompts_per_step."
        )


MISLEADING_WARNINGS = (
    ".*but no pre-optimization state was saved.*",  # the weights after the step are the ones wanted
    ".*Experiment logs directory .* exists and is not empty.*",  # the other logger has just made it
    ".*treespec, LeafSpec.*",
    ".*LightningCLI's args parameter is intended to run.*",
    ".*The dirpath has changed from.*",  # of the checkpoint callback, which evaluation does not use
)


def main(args: list[str] | None = None) -> None:
    """Run a command; mistakes of the user end in one line and exit status 2, failures of the machine in status 1."""
    for message in MISLEADING_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    sys.path.insert(0, os.getcwd())  # classes of the user's own folder, as under `python -m`
    words = sys.argv[1:] if args is None else args
    command = words[0] if words else ""
    try:
        if not command.startswith("-") and command not in COMMANDS:
            found = f"there is no command {command}" if command else "no command"
            raise ValueError(f"{found}; expected one of {', '.join(COMMANDS)}.")
        if command in PLAIN_COMMANDS:
            auto_cli(
                PLAIN_COMMANDS[command],
                args=words[1:],
                prog=f"{PROGRAM} {command}",
                as_positional=False,
                description=str(PLAIN_COMMANDS[command].__doc__).splitlines()[0],
                parser_class=OneLineParser,
                allow_abbrev=False,
            )
        else:
            OPDCLI(args)
    except (ValueError, MisconfigurationException) as error:
        _stop(error, status=2)
    except (OSError, FloatingPointError) as error:
        _stop(error, status=1)


def _stop(error: Exception, status: int) -> NoReturn:
    if os.environ.get("OPD_LIGHTNING_TRACEBACK"):
        raise error
    print(f"{PROGRAM}: error: {explain(str(error))}\n(OPD_LIGHTNING_TRACEBACK=1 shows where)", file=sys.stderr)
    sys.exit(status)
