"""The door: `opd-lightning fit|validate|test|predict|diagnose|plan --config x.yaml`, and the plain commands."""

from __future__ import annotations

import errno
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace, auto_cli
from jsonargparse.typing import PositiveInt
from lightning import Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from opd_lightning import __version__
from opd_lightning.callbacks.answers import AnswersWriter
from opd_lightning.callbacks.held_out_marks import HeldOutMarks
from opd_lightning.callbacks.progress import with_progress_bar
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.callbacks.start_validation import StartValidation
from opd_lightning.callbacks.student_summary import StudentSummary
from opd_lightning.commands import shipped_configs
from opd_lightning.commands.analyze import analyze
from opd_lightning.commands.ckpt_path import WORDS, check_checkpoint, find_checkpoint
from opd_lightning.commands.completion import PrintAndExit, completion_script
from opd_lightning.commands.diagnose import DiagnosingTrainer
from opd_lightning.commands.null_settings import check_nulls
from opd_lightning.commands.parser import PROGRAM, OneLineParser, explain, options_of
from opd_lightning.commands.plan import PLANNED_ON, PlanningTrainer
from opd_lightning.commands.plan_line import PlanLine
from opd_lightning.commands.quiet import be_quiet
from opd_lightning.commands.report import report, with_runs_named
from opd_lightning.commands.rollout import RolloutTrainer
from opd_lightning.commands.run_records import RunRecords, keep_logs_in_root
from opd_lightning.commands.short_names import import_rooms
from opd_lightning.commands.suggestions import nearest
from opd_lightning.commands.trainer_settings import check_trainer
from opd_lightning.interfaces.addresses import check_nothing_left_out, without_secrets
from opd_lightning.training.checkpoint_files import is_remote, without_scheme
from opd_lightning.training.checkpoints import WholeCheckpoints, export
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.metrics_file import WholeCSVLogger
from opd_lightning.training.module import OPDModule
from opd_lightning.training.output_paths import free_space, run_folder

DEFAULT_CLASSES = {  # what the constructors take for None, spelt out so that --print_config and config.yaml say it
    "model.objective": "opd_lightning.objectives.DivergenceObjective",
    "data.engine": "opd_lightning.backends.hf.HFEngine",
    "data.source": "opd_lightning.rollouts.on_policy.OnPolicy",
    "data.selector": "opd_lightning.selection.Shuffled",
}
PLAIN_COMMANDS: dict[str, Callable[..., None]] = {
    "export": export,
    "analyze": analyze,
    "report": report,
    "configs": shipped_configs.show_configs,
}
OWN_VERBS = ("diagnose", "plan", "rollout")
COMMANDS = ("fit", "validate", "test", "predict", *OWN_VERBS, *PLAIN_COMMANDS)
DESCRIPTION = f"On-policy distillation of language models. Commands without a trainer: {', '.join(PLAIN_COMMANDS)}."
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MISTAKES_AS_RUNTIME_ERRORS = ("Early stopping conditioned on metric",)  # how Lightning says that there is none


def _as_data_seed(seed_everything: bool | int) -> int:
    if isinstance(seed_everything, bool):
        raise ValueError(
            f"seed_everything: expected an integer, since rollouts are a function of it; got {seed_everything}."
        )
    if not 0 <= seed_everything < 2**32:
        raise ValueError(f"seed_everything: expected an integer from 0 to {2**32 - 1}, got {seed_everything}.")
    return seed_everything


class OPDTrainer(DiagnosingTrainer, PlanningTrainer, RolloutTrainer):
    """Lightning's trainer with the verbs of our own."""


class OPDCLI(LightningCLI):
    """LightningCLI with one seed for everything, no abbreviations, and a configuration that wins over checkpoints."""

    def __init__(self, args: list[str] | None = None) -> None:
        import_rooms()
        self._words = sys.argv[1:] if args is None else args
        super().__init__(
            OPDModule,
            OPDDataModule,
            trainer_class=OPDTrainer,
            seed_everything_default=0,
            trainer_defaults={
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,  # StartValidation runs the whole one
                "callbacks": [PlanLine(), StartValidation(), AnswersWriter(), HeldOutMarks(), RescueCheckpoint()],
            },
            parser_class=OneLineParser,
            parser_kwargs={
                "allow_abbrev": False,
                "prog": PROGRAM,
                "description": DESCRIPTION,
                "version": __version__,
            },
            auto_configure_optimizers=False,  # `model.optimizer` is the place
            save_config_callback=RunRecords,
            args=args,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, asked of the object
        """The command that was given: every other one costs a parser that nobody asks."""
        known = LightningCLI.subcommands() | {verb: {"model", "datamodule"} for verb in OWN_VERBS}
        return {name: known[name] for name in self._words[:1] if name in known} or known

    @override
    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        self.parser.add_argument(
            "--print_completion",
            action=PrintAndExit,
            make_text=self._completion,
            help="Print a completion script for bash and zsh, and exit.",
        )

    def _completion(self) -> str:
        options: dict[str, Iterable[str]] = {name: options_of(each) for name, each in self._subcommand_parsers.items()}
        for name, command in PLAIN_COMMANDS.items():
            options[name] = [f"--{argument}" for argument in inspect.signature(command).parameters]
        options["configs"] = shipped_configs.names()
        return completion_script(PROGRAM, options, shipped_configs.names())

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({name: {"class_path": path} for name, path in DEFAULT_CLASSES.items()})
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_as_data_seed)
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch; null leaves the choice to torch. Tiny models are fastest with 1.",
        )

    @override
    def before_instantiate_classes(self) -> None:
        settings = self.config[self.config.subcommand]
        for name in ("model", "data", "trainer", "data.sampling"):  # jsonargparse lets an empty list through
            if not isinstance(settings[name], Namespace):
                raise ValueError(f"{name}: expected settings by name, got {settings[name]!r}.")
        dump = self._parser(self.config.subcommand).dump(settings, skip_unset=False, skip_validation=True)
        check_nothing_left_out(yaml.safe_load(dump))
        check_trainer(settings.trainer)
        check_nulls(settings)
        keep_logs_in_root(settings.trainer)
        if self.config.subcommand == "plan":  # works without the hardware
            self._asked = {name: settings.trainer[name] for name in PLANNED_ON}
            for name, value in PLANNED_ON.items():
                settings.trainer[name] = value
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)

    @override
    def _parse_ckpt_path(self) -> None:
        # The original lets hyper-parameters stored in a checkpoint override the file and the flags the user just gave.
        settings, is_fit = self.config[self.config.subcommand], self.config.subcommand == "fit"
        if "weights_only" not in settings:  # diagnose takes no checkpoint
            return
        wanted = settings.get("ckpt_path")
        if wanted in WORDS:
            settings.ckpt_path = str(find_checkpoint(wanted, settings.trainer, to_train=is_fit))
            rank_zero_only(print)(f"--ckpt_path {wanted} is {settings.ckpt_path}", file=sys.stderr)
        elif wanted:
            settings.ckpt_path = without_scheme(wanted)
            if not is_remote(settings.ckpt_path):  # others are fetched once, by WholeCheckpoints
                check_checkpoint(settings.ckpt_path, to_train=is_fit)
        if settings.weights_only is False:
            raise ValueError("weights_only: false would run what a checkpoint says. Leave it out.")
        settings.weights_only = True  # for strategies and plugins that read checkpoints themselves

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        plugins = _as_list(config.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpoints()]
        if config.get("logger") is None:
            root = config.get("default_root_dir") or os.getcwd()
            tensorboard = TensorBoardLogger(root)
            kwargs["logger"] = [tensorboard, WholeCSVLogger(root, version=tensorboard.version)]
        callbacks = with_progress_bar(config.get("callbacks"), is_wanted=config.get("enable_progress_bar"))
        ours = self.trainer_defaults["callbacks"]  # a callback of the user's takes the place of ours of its kind
        ours[:] = [each for each in ours if not any(isinstance(other, type(each)) for other in callbacks)]
        if config.get("enable_model_summary") is not False and not config.get("barebones"):
            if not any(isinstance(callback, ModelSummary) for callback in callbacks):
                callbacks.append(StudentSummary())
            kwargs["enable_model_summary"] = False  # Lightning's own
        kwargs["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:  # settings of the right type for the signature only
            raise ValueError(f"trainer: {error}") from error

    def before_plan(self) -> None:
        """Tell the trainer what it would be for."""
        self.trainer.asked = self._asked  # type: ignore[attr-defined]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except OSError as error:
            if error.errno not in DISK_FAILURES or error.filename is not None:
                raise
            folder = run_folder(self.trainer)  # it is the loggers who say nothing
            raise OSError(
                f"{error.strerror} while writing to {str(folder)!r}, logs included ({free_space(folder)}). What is"
                " there stays: make room or mend the disk, and resume with --ckpt_path and the last checkpoint."
            ) from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def main(args: list[str] | None = None) -> None:
    """Run a command; mistakes of the user end in one line and exit status 2, failures of the machine in status 1.

    A command that a signal ended has the status that shells give it, 128 plus the signal's number.
    """
    be_quiet()
    if os.getcwd() not in sys.path:  # classes of the user's own folder; last, so that none shadows an installed package
        sys.path.append(os.getcwd())
    words = sys.argv[1:] if args is None else args
    command = words[0] if words else ""
    try:
        for word in words:
            if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python keeps bytes that are no text
                raise ValueError(f"{word!r}: expected UTF-8 text on the command line. Mend it, or rename the file.")
        if not command.startswith("-") and command not in COMMANDS:
            found = f"there is no command {command}.{nearest(command, COMMANDS)}" if command else "no command."
            raise ValueError(f"{found} Expected one of {', '.join(COMMANDS)}.")
        if command in PLAIN_COMMANDS:
            _run_plain(command, words[1:])
        else:
            OPDCLI(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning answers Ctrl-C by leaving with status 1
            sys.exit(128 + signal.SIGINT)
        raise
    except (ValueError, MisconfigurationException, ImportError) as error:  # the last: a package that is only needed now
        _stop(error, status=2)
    except (OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        _stop(error, status=1)
    except RuntimeError as error:
        if not str(error).startswith(MISTAKES_AS_RUNTIME_ERRORS):
            raise
        _stop(error, status=2)


def _run_plain(command: str, words: list[str]) -> None:
    if command == "configs" and words and not words[0].startswith("-"):
        words = ["--name", *words]
    if command == "report":
        words = with_runs_named(words)
    if command == "analyze":  # auto_cli keeps --config for itself, and drops an argument of that name
        words = [re.sub("^--config(?==|$)", "--run_config", word) for word in words]
    auto_cli(
        PLAIN_COMMANDS[command],
        args=words,
        prog=f"{PROGRAM} {command}" + (" RUN [RUN2 ...]" if command == "report" else ""),
        as_positional=False,
        description=str(PLAIN_COMMANDS[command].__doc__).splitlines()[0],
        parser_class=OneLineParser,
        allow_abbrev=False,
    )


def _stop(error: Exception, status: int) -> NoReturn:
    if os.environ.get("OPD_LIGHTNING_TRACEBACK"):
        raise error
    print(
        f"{PROGRAM}: error: {without_secrets(explain(str(error)))}\n(OPD_LIGHTNING_TRACEBACK=1 shows where)",
        file=sys.stderr,
    )
    sys.exit(status)
